"""What a process sets up: its command line, flags, caches, signals and fellow processes."""
