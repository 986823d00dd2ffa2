"""Asks the order database a question."""

import socket

with socket.create_connection(("198.51.100.20", 5432), timeout=5) as database:
    database.sendall(b"count\n")
    print(database.makefile().readline().strip(), "orders")
