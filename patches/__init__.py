"""Changes to other packages, one folder per package, one change per file; see README.md."""
