"""The world outside the agent: a code host, a database and a cloud metadata service.

Small but real servers on the addresses of the demo's own network namespace. Prints "ready"
when all of them listen, and ends when its standard input does.
"""

import functools
import http.server
import json
import socket
import socketserver
import sys
import threading
import time

CODE_HOST = ("192.0.2.10", 80)
DATABASE = ("198.51.100.20", 5432)
METADATA = ("169.254.169.254", 80)
NAME_SERVER = ("203.0.113.53", 53)

CREDENTIALS = {"Code": "Success", "AccessKeyId": "AKIADEMO", "SecretAccessKey": "not-a-secret"}


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves a directory, and writes no log between the lines of the demo."""

    def log_message(self, *_):
        pass


class Metadata(Quiet):
    """Hands out the machine's credentials to whoever asks, as the real one does."""

    def do_GET(self):
        body = json.dumps(CREDENTIALS).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class Database(socketserver.StreamRequestHandler):
    """Answers `count` with a number, and `dump` with rows that do not end by themselves."""

    def handle(self):
        command = self.rfile.readline().strip()
        if command == b"count":
            self.wfile.write(b"48211\n")
        elif command == b"dump":
            row = b"order 48211, one more row of what nobody was to copy\n" * 64
            try:
                while True:
                    self.wfile.write(row)
                    time.sleep(0.01)
            except OSError:
                pass


class NameServer(socketserver.BaseRequestHandler):
    """Takes any datagram and sends it back: enough to carry data out by."""

    def handle(self):
        data, sock = self.request
        sock.sendto(data, self.client_address)


class Threaded(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True


def main():
    servers = [
        Threaded(CODE_HOST, functools.partial(Quiet, directory=sys.argv[1])),
        Threaded(DATABASE, Database),
        Threaded(METADATA, Metadata),
        socketserver.ThreadingUDPServer(NAME_SERVER, NameServer),
    ]
    for server in servers:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    print("ready", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
