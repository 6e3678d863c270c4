"""Other libraries' training loops with this package's losses. Each needs an extra, and nothing else imports them."""
