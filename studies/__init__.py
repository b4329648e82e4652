"""Studies: what was trained, measured and compared, each as a package that is run by `python -m studies.NAME`."""
