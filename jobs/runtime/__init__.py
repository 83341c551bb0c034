"""Shared by all commands: command-line conventions and the connection to Ray."""
