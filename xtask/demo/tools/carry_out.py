"""Carries data out by datagrams to a name server, which need no connection."""

import socket

with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as name_server:
    name_server.settimeout(3)
    name_server.sendto(b"secret.example.com", ("203.0.113.53", 53))
    print(len(name_server.recv(512)), "bytes went out and came back")
