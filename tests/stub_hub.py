"""A hub on loopback that answers as badly as the name of a repository says: `moods/MOOD`."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

MOODS = {
    "refuses": "could not be reached: ConnectError",
    "silent": "no whole answer within",
    "drips-headers": "no whole answer within",
    "drips-body": "no whole answer within",
    "drips-file": "it drips",
    "breaks-off": "peer closed connection",
    "401": "Log in",
    "403": "it is gated",
    "404": "there is no such repository",
    "429": "Wait 17 s",
    "503": "it is down or overloaded",
}
"""Each mood, and what its message says."""
PASSING = ("well", "503-twice", "breaks-once")
COMMIT = "0" * 40


class StubHub(ThreadingHTTPServer):
    """Serves the files of a folder under every name `moods/MOOD`; its answers follow the mood. Used as a context."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.folder, self.asked, self.silent, self.over = folder, [], False, threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *error):
        self.over.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):
        """Clients hang up."""


class Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        """Quiet."""

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def do_POST(self):
        self.sent = self.rfile.read(int(self.headers.get("content-length", 0)))
        self.answer()

    def answer(self):
        path = unquote(urlparse(self.path).path)
        mood = next((part for part in path.split("/") if part in (*MOODS, *PASSING)), "404")
        before = self.server.asked.count((self.command, path))
        self.server.asked.append((self.command, path))
        if mood == "silent" or self.server.silent:
            self.server.over.wait(60)
            self.close_connection = True
        elif mood == "drips-headers":
            self.drip(b"HTTP/1.1 200 OK\r\nX-Padding: " + b"a" * 1000)
        elif mood in ("401", "403", "404", "429", "503") or (mood == "503-twice" and before < 2):
            code = {"403": "GatedRepo", "404": "RepoNotFound"}.get(mood)
            headers = {"X-Error-Code": code, "Retry-After": "17" if mood == "429" else None}
            self.reply(int(mood[:3]), b"", {name: value for name, value in headers.items() if value})
        else:
            self.serve(path, mood, before)

    def serve(self, path, mood, before):
        name = f"moods/{mood}"
        files = sorted(file.name for file in self.server.folder.iterdir())
        entries = [
            {
                "type": "file",
                "path": file,
                "size": len(raw := (self.server.folder / file).read_bytes()),
                "oid": hashlib.sha1(raw).hexdigest(),
            }
            for file in files
        ]
        if "/resolve/" in path:
            file = self.server.folder / path.rpartition("/")[2]
            if not file.is_file():
                return self.reply(404, b"", {"X-Error-Code": "EntryNotFound"})
            raw = file.read_bytes()
            return self.reply(200, raw, {"ETag": f'"{hashlib.sha1(raw).hexdigest()}"', "X-Repo-Commit": COMMIT}, mood, before)
        if "/tree/" in path:
            found = entries
        elif "/paths-info/" in path:
            found = [one for one in entries if one["path"] in unquote(self.sent.decode())]
        else:
            found = {
                "id": name,
                "sha": COMMIT,
                "private": False,
                "siblings": [{"rfilename": file} for file in files],
                "tags": [],
            }
        return self.reply(200, json.dumps(found).encode(), {"Content-Type": "application/json"}, mood, before)

    def reply(self, status, raw, headers, mood="", before=0):
        total = len(raw)
        if (wanted := self.headers.get("range")) and status == 200:
            begin, _, end = wanted.partition("=")[2].partition("-")
            status, raw = 206, raw[int(begin) : int(end) + 1 if end else None]
            headers = {**headers, "Content-Range": f"bytes {begin}-{int(begin) + len(raw) - 1}/{total}"}
        self.send_response(status)
        for name, value in {**headers, "Content-Length": len(raw)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "HEAD":
            return
        if mood == "drips-body" or (mood == "drips-file" and "/resolve/" in self.path):
            self.drip(raw)
        elif (mood == "breaks-off" or (mood == "breaks-once" and not before and len(raw) > 5000)) and len(raw) > 1:
            self.wfile.write(raw[: len(raw) // 2])
            self.close_connection = True
        else:
            self.wfile.write(raw)

    def drip(self, raw):
        self.close_connection = True
        for byte in raw:
            if self.server.over.wait(0.02):
                return
            self.wfile.write(bytes([byte]))
            self.wfile.flush()
