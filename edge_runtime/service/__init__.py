"""What a server needs to live under a service manager: its unit, its messages, its watchdog, its sockets, its state."""
