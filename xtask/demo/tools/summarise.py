"""Reads the issue again and says how long it is: a script the agent wrote for itself."""

import urllib.request

with urllib.request.urlopen("http://192.0.2.10/issues/17.json", timeout=5) as answer:
    print(len(answer.read()), "bytes to think about")
