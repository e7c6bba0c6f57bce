"""A model hub on this machine: the part of the Hugging Face Hub's HTTP interface that a download needs.

The clients are the real ones (huggingface_hub inside transformers and vLLM), told by ``HF_ENDPOINT`` where to look.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

REVISION = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def serve(name: str, folder: Path) -> Iterator[tuple[str, list[str]]]:
    """A hub whose only repository ``name`` holds the files of ``folder``; its address and the paths it was asked for.

    ``folder`` must not change meanwhile. Anything else is answered with 404, as the hub does for unknown names.
    """
    asked: list[str] = []
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    digests = {file: hashlib.sha256(path.read_bytes()).hexdigest() for file, path in files.items()}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            asked.append(path)
            api, tree = f"/api/models/{name}", f"/api/models/{name}/tree/"
            if path.startswith(tree):
                revision, _, below = path.removeprefix(tree).partition("/")
                self._json([e for e in _entries(files, digests) if _is_below(e["path"], below)])
            elif path == api or path.startswith(f"{api}/revision/"):
                siblings = [{"rfilename": file} for file in files]
                self._json({"id": name, "modelId": name, "sha": REVISION, "siblings": siblings, "tags": []})
            elif path.startswith(f"/{name}/resolve/"):
                file = path.removeprefix(f"/{name}/resolve/").partition("/")[2]
                self._file(files.get(file), digests.get(file))
            else:
                self._missing("RepoNotFound")

        def _headers(self, status: int, length: int, more: dict[str, str]) -> None:
            self.send_response(status)
            for key, value in {"Content-Length": str(length), "X-Repo-Commit": REVISION, **more}.items():
                self.send_header(key, value)
            self.end_headers()

        def _json(self, value: object) -> None:
            body = json.dumps(value).encode()
            self._headers(200, len(body), {"Content-Type": "application/json"})
            if self.command == "GET":
                self.wfile.write(body)

        def _missing(self, code: str) -> None:
            self._headers(404, 0, {"X-Error-Code": code})

        def _file(self, path: Path | None, digest: str | None) -> None:
            if path is None:
                self._missing("EntryNotFound")
                return
            self._headers(200, path.stat().st_size, {"ETag": f'"{digest}"', "Content-Type": "application/octet-stream"})
            if self.command == "GET":
                with path.open("rb") as source:
                    shutil.copyfileobj(source, self.wfile)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


def _entries(files: dict[str, Path], digests: dict[str, str]) -> list[dict[str, object]]:
    return [
        {"type": "file", "path": file, "size": path.stat().st_size, "oid": digests[file][:40]}
        for file, path in files.items()
    ]


def _is_below(file: str, folder: str) -> bool:
    return not folder or file == folder or file.startswith(f"{folder}/")
