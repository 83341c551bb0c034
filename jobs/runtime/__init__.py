"""What every command shares: its command line and its connection to Ray."""
