"""The numbers behind the guidance explorer, without a browser."""
