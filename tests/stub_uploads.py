"""A hub on loopback that takes uploads as the real one does: create, preupload, LFS batch, PUT, commit, pull requests."""

import base64
import hashlib
import json
import re
from urllib.parse import parse_qs, unquote, urlparse

from stub_hub import Answers, StubHub

LARGE = 2000  # bytes from which on a file is kept by LFS
TOKEN = "hf_" + "Ab1" * 11


def blob_id(raw):
    return hashlib.sha1(b"blob %d\0" % len(raw) + raw).hexdigest()


class WritableHub(StubHub):
    """repositories: name -> revision -> path -> content; `private`: names; `objects`: sha256 -> content, as LFS keeps them.

    refuse  (method, path, number of such requests before) -> status of the answer; 0: it is answered; -1: the line is cut
    """

    def __init__(self, folder, refuse=lambda method, path, before: 0):
        super().__init__(folder)
        self.RequestHandlerClass = Writable
        self.repositories, self.private, self.objects, self.refuse = {}, set(), {}, refuse
        self.sent, self.tokens, self.messages = [], set(), []

    def of(self, name="me/model", revision="main"):
        return self.repositories[name][revision]


class Writable(Answers):
    def chunks(self):
        """The parts of a body that is sent without its length."""
        if self.headers.get("transfer-encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()

    def take(self):
        hub, url = self.server, urlparse(self.path)
        path, query = unquote(url.path), parse_qs(url.query)
        before = sum(method == self.command for method, _ in hub.asked)
        hub.asked.append((self.command, path))
        status = hub.refuse(self.command, path, before)
        length = int(self.headers.get("content-length", 0))
        if status < 0:
            self.rfile.read(length // 2)
            self.close_connection = True
            return self.connection.close()
        raw = self.rfile.read(length) if "content-length" in self.headers else b"".join(self.chunks())
        hub.tokens.add(self.headers.get("authorization"))
        if status:
            return self.reply(status, b"", {"X-Error-Message": "no entry of a registered benchmark"} if status == 400 else {})
        if path.startswith("/objects/"):
            oid = path.rpartition("/")[2]
            assert hashlib.sha256(raw).hexdigest() == oid
            hub.objects[oid] = raw
            hub.sent.append(oid)
            return self.reply(200, b"", {"ETag": oid})
        if path.endswith("/info/lfs/objects/batch"):
            asked = json.loads(raw)["objects"]
            there = [{**one, "actions": {"upload": {"href": f"{hub.url}/objects/{one['oid']}"}}} for one in asked]
            found = [one if one["oid"] not in hub.objects else {**one, "actions": None} for one in there]
            found = [{name: value for name, value in one.items() if value is not None} for one in found]
            return self.json({"objects": found, "transfer": "basic"})
        if path == "/api/validate-yaml":
            return self.json({"warnings": [], "errors": []})
        if path == "/api/repos/create":
            asked = json.loads(raw)
            name = f"{asked['organization']}/{asked['name']}"
            hub.repositories[name] = {"main": {}}
            if asked.get("visibility") == "private" or asked.get("private"):
                hub.private.add(name)
            return self.json({"url": f"{hub.url}/{name}", "name": name})
        name = re.match(r"/(?:api/models/)?([^/]+/[^/]+)", path)[1]
        if name not in hub.repositories:
            return self.reply(404, b"", {"X-Error-Code": "RepoNotFound"})
        rest = path.partition(name)[2].strip("/").split("/", 1)
        verb, revision = rest[0], "/".join(rest[1:]) or "main"
        if verb == "resolve":
            revision, _, file = revision.partition("/")
            if (content := hub.of(name, revision).get(file)) is None:
                return self.reply(404, b"", {"X-Error-Code": "EntryNotFound"})
            return self.reply(200, content, {"ETag": f'"{blob_id(content)}"', "X-Repo-Commit": "0" * 40})
        if verb != "" and revision not in hub.repositories[name]:
            return self.reply(404, b"", {"X-Error-Code": "RevisionNotFound"})
        return self.json(getattr(self, verb.replace("-", "_") or "info")(name, revision, raw, query))

    def info(self, name, revision, raw, query):
        return {"id": name, "sha": "0" * 40, "private": name in self.server.private, "siblings": [], "tags": []}

    def paths_info(self, name, revision, raw, query):
        files = self.server.of(name, revision)
        return [self.entry(path, files[path]) for path in parse_qs(raw.decode())["paths"] if path in files]

    def entry(self, path, content):
        large = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
        return {"type": "file", "path": path, "size": len(content), "oid": blob_id(content),
                **({"lfs": large} if len(content) >= LARGE else {})}  # fmt: skip

    def preupload(self, name, revision, raw, query):
        mode = {one["path"]: "lfs" if one["size"] >= LARGE else "regular" for one in json.loads(raw)["files"]}
        return {"files": [{"path": path, "uploadMode": kind, "shouldIgnore": False} for path, kind in mode.items()]}

    def commit(self, name, revision, raw, query):
        hub, number = self.server, ""
        if "create_pr" in query:
            number = f"refs/pr/{len(hub.repositories[name])}"
            hub.repositories[name][number] = dict(hub.of(name, revision))
            revision = number
        for line in map(json.loads, raw.splitlines()):
            if line["key"] == "header":
                hub.messages.append((revision, line["value"]["summary"]))
            elif line["key"] == "file":
                content = base64.b64decode(line["value"]["content"])
                hub.of(name, revision)[line["value"]["path"]] = content
                hub.sent.append(line["value"]["path"])
            else:
                hub.of(name, revision)[line["value"]["path"]] = hub.objects[line["value"]["oid"]]
        pull = f"{hub.url}/{name}/discussions/{number.rpartition('/')[2]}"
        return {"commitUrl": f"{hub.url}/{name}/commit/1", "commitOid": "1" * 40, "pullRequestUrl": pull}

    def json(self, found):
        return self.reply(200, json.dumps(found).encode(), {"Content-Type": "application/json"})

    do_PUT = do_POST = do_GET = do_HEAD = take  # noqa: N815
