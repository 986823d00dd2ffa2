"""An agent's loop: it is told which tool to use, uses it, and says what came of it.

What a language model would decide comes line by line on standard input, so that the demo is
the same every time: `run <tool>` waits for the tool, `start <tool>` lets it go on beside
others. Each answer is one line of JSON. The agent knows nothing of any guard: it meets
ordinary errors.
"""

import json
import pathlib
import subprocess
import sys
import threading
import time

TOOLS = pathlib.Path(__file__).parent / "tools"
INTERPRETERS = {".sh": "/usr/bin/bash", ".py": "/usr/bin/python3"}
LIMIT_S = 10


def command(tool):
    path = TOOLS / tool
    return [INTERPRETERS[path.suffix], str(path)]


def say(**answer):
    print(json.dumps(answer), flush=True)


def last_line(text):
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else ""


def run(tool):
    begin = time.monotonic()
    try:
        done = subprocess.run(
            command(tool), capture_output=True, text=True, timeout=LIMIT_S, errors="replace"
        )
        status, said = done.returncode, last_line(done.stdout if done.returncode == 0 else done.stderr)
    except subprocess.TimeoutExpired:
        status, said = 124, f"no end after {LIMIT_S} s"
    except OSError as error:
        status, said = 126, str(error)
    say(tool=tool, status=status, said=said, seconds=round(time.monotonic() - begin, 3))


def start(tool):
    process = subprocess.Popen(
        command(tool), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )

    def follow():
        said = ""
        for line in process.stdout:
            said = line.strip()
            say(tool=tool, progress=said)
        say(tool=tool, status=process.wait(), said=said, seconds=0.0)

    threading.Thread(target=follow, daemon=True).start()


def main():
    for line in sys.stdin:
        verb, _, tool = line.strip().partition(" ")
        {"run": run, "start": start}[verb](tool)


if __name__ == "__main__":
    main()
