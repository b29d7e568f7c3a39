"""One page and its pictures about one run or several: what `tools/report.py` makes of run directories."""
