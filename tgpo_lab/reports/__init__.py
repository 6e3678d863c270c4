"""A run or several told as tables and a page."""
