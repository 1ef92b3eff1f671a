"""The report of a run: its files → numbers and pictures → one HTML file that explains the run by itself."""
