"""Random training configurations, each held against an eager float64 reference of the same training in one process."""
