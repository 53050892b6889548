"""What host libraries need beside ``convert_``: one small file a host, imported only when used."""
