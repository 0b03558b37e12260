"""A stand-in of the Hugging Face hub: what its client asks to write a repository and to read it."""

import base64
import hashlib
import http.server
import json
import re
import threading
from urllib.parse import unquote

TOKEN = "hf_of_the_stand_in"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = (".safetensors", ".onnx")  # kept by LFS, as .gitattributes says


class Hub:
    """Repositories in memory, `{name: {file: bytes}}`, at `url`; `asked` is what was asked."""

    def __init__(self):
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.blobs: dict[str, bytes] = {}
        self.asked: list[str] = []
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _do(self):
                length = int(self.headers.get("Content-Length") or 0)
                if "chunked" in self.headers.get("Transfer-Encoding", ""):
                    body = b""
                    while size := int(self.rfile.readline(), 16):
                        body += self.rfile.read(size)
                        self.rfile.readline()
                    self.rfile.readline()
                else:
                    body = self.rfile.read(length)
                path = unquote(self.path.partition("?")[0])
                hub.asked.append(f"{self.command} {path}")
                known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
                code, headers, content = hub.answer(self.command, path, body, known)
                self.send_response(code)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            do_GET = do_POST = do_PUT = do_HEAD = _do

            def log_message(self, *_):
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()

    def answer(self, method, path, body, known):
        """Return status, headers and content."""
        if method != "GET" and method != "HEAD" and "/blob/" not in path and not known:
            return _json({"error": "Invalid username or password."}, 401)
        if path == "/api/whoami-v2":
            return _json({"name": "me", "type": "user", "orgs": []}, 200 if known else 401)
        if path == "/api/validate-yaml":
            return _json({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if match := re.fullmatch(r"/api/models/(.+)/preupload/main", path):
            files = [f["path"] for f in json.loads(body)["files"]]
            modes = [
                {
                    "path": name,
                    "uploadMode": "lfs" if name.endswith(LARGE) else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for name in files
            ]
            return _json({"files": modes})
        if path.endswith("/info/lfs/objects/batch"):
            objects = [self._action(o) for o in json.loads(body)["objects"]]
            return _json({"transfer": "basic", "objects": objects})
        if match := re.fullmatch(r"/blob/([0-9a-f]{64})", path):
            assert hashlib.sha256(body).hexdigest() == match[1]
            self.blobs[match[1]] = body
            return 200, {}, b""
        if match := re.fullmatch(r"/api/models/(.+)/commit/main", path):
            return self._commit(match[1], [json.loads(line) for line in body.splitlines()])
        if match := re.fullmatch(r"/api/models/(.+)/tree/[^/]+", path):
            files = self.repositories.get(match[1], {}).items()
            oid = "0" * 40
            return _json(
                [{"type": "file", "path": f, "size": len(x), "oid": oid} for f, x in files]
            )
        if match := re.fullmatch(r"/api/models/(.+?)(/revision/.+)?", path):
            return self._info(match[1])
        if match := re.fullmatch(r"/(.+/.+)/resolve/[^/]+/(.+)", path):
            return self._file(match[1], match[2])
        return _json({"error": f"not of this stand-in: {method} {path}"}, 404)

    def _create(self, asked):
        name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else ""
        name = name or f"me/{asked['name']}"
        there = name in self.repositories
        self.repositories.setdefault(name, {})
        if not there:
            self.private[name] = asked.get("private") or asked.get("visibility") == "private"
        return _json({"url": f"{self.url}/{name}", "id": name}, 409 if there else 200)

    def _action(self, wanted):
        oid = wanted["oid"]
        actions = {"upload": {"href": f"{self.url}/blob/{oid}"}}
        return {**wanted, **({} if oid in self.blobs else {"actions": actions})}

    def _commit(self, name, lines):
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                assert value["encoding"] == "base64"
                self.repositories[name][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.repositories[name][value["path"]] = self.blobs[value["oid"]]
        url = f"{self.url}/{name}/commit/{COMMIT}"
        return _json({"success": True, "commitOid": COMMIT, "commitUrl": url, "hookOutput": ""})

    def _info(self, name):
        if name not in self.repositories:
            return _json({"error": "Repository not found"}, 404)
        files = [{"rfilename": file} for file in sorted(self.repositories[name])]
        return _json({"id": name, "modelId": name, "sha": COMMIT, "siblings": files})

    def _file(self, name, file):
        content = self.repositories.get(name, {}).get(file)
        if content is None:
            return _json({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
        etag = hashlib.sha256(content).hexdigest()
        return 200, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}, content


def _json(value, code=200, headers=None):
    return code, {"Content-Type": "application/json", **(headers or {})}, json.dumps(value).encode()
