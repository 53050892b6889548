"""Behind the command line: data, networks, training loops, results, plots and report pages."""
