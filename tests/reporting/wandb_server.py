"""A server that answers the client of Weights & Biases just enough, or as badly as a test asks."""

import gzip
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KEY = "0123456789" * 4


class Server(ThreadingHTTPServer):
    """Listens on a free port of this machine.

    mood: "well" answers; "silent" accepts and never answers; "broken" answers 500 to everything;
    "gone" closes connections without an answer. It can be changed at any time. history: the rows of
    the run, by their place, as the client sent them; asked: names of the GraphQL requests; bucket:
    what the client has said about the run; files: the paths of uploads.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self, mood="well"):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.mood, self.history, self.asked, self.bucket = mood, {}, [], {}
        self.files = []
        self.over = threading.Event()

    def handle_error(self, request, client_address):
        pass  # the client may have gone

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"

    def stop_listening(self):
        """Closes the port; connections that are open stay."""
        self.shutdown()
        self.socket.close()

    def rows(self):
        """The rows of the history in their order, as dicts."""
        return [json.loads(self.history[i]) for i in sorted(self.history)]

    def answer(self, query, variables):
        """The data of the answer to a GraphQL request."""
        run = {"id": "UnVu", "name": "r", "displayName": "r", "config": "{}", "sweepName": None}
        run |= {"project": {"id": "p", "name": "p", "entity": {"id": "e", "name": "me"}}}
        if "mutation UpsertBucket" in query:
            new = not self.bucket
            self.bucket |= {k: v for k, v in variables.items() if v is not None}
            run["name"] = run["displayName"] = self.bucket.get("name", "r")
            bucket = {**run, "historyLineCount": len(self.history)}
            return {"upsertBucket": {"bucket": bucket, "inserted": new}}
        if "query RunResumeStatus" in query:
            tail = self.history[max(self.history)] if self.history else "{}"
            step = json.loads(tail).get("_step", 0)
            summary = json.dumps({"_step": step, "_runtime": 1})
            found = {**run, "name": self.bucket.get("name", "r"), "tags": [], "fileCount": 0}
            found |= {"historyLineCount": len(self.history), "eventsLineCount": 0}
            found |= {"logLineCount": 0, "historyTail": json.dumps([tail]), "eventsTail": "[]"}
            found |= {
                "summaryMetrics": summary,
                "wandbConfig": json.dumps({"t": 1}),
                "stopped": False,
            }
            model = {"id": "p", "name": "p", "entity": {"id": "e", "name": "me"}}
            return {"model": {**model, "bucket": found if self.bucket else None}}
        if "query Viewer" in query or "viewer" in query:
            return {"viewer": {"id": "v", "entity": "me", "username": "me", "flags": "{}"}}
        if "serverInfo" in query or "ServerFeatures" in query:
            return {"serverInfo": {"features": [], "cliVersionInfo": {}}}
        if "mutation CreateRunFiles" in query:
            files = [{"name": f, "uploadUrl": f"{self.url}/f/{f}"} for f in variables["files"]]
            made = {"runID": "UnVu", "uploadHeaders": [], "files": files}
            return {"createRunFiles": made}
        return {}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_POST(self):
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.server.mood == "silent":
            self.server.over.wait()
            return
        if self.server.mood == "gone":
            self.close_connection = True
            return
        if self.server.mood == "broken":
            self._reply(500, {"error": "out of order"})
            return
        if self.headers.get("Content-Encoding") == "gzip":
            content = gzip.decompress(content)
        if "file_stream" in self.path:
            part = json.loads(content or b"{}").get("files", {}).get("wandb-history.jsonl")
            for i, line in enumerate(part["content"] if part else []):
                self.server.history[part["offset"] + i] = line
            self._reply(200, {})
        elif "graphql" in self.path:
            request = json.loads(content)
            self.server.asked.append(request.get("operationName") or request["query"][:40])
            data = self.server.answer(request["query"], request.get("variables") or {})
            self._reply(200, {"data": data})
        else:
            self.server.files.append(self.path)
            self._reply(200, {})

    do_GET = do_PUT = do_POST

    def _reply(self, code, value):
        content = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@contextmanager
def serving(mood="well"):
    """A running Server, closed at the end; one that is silent lets its connections go then."""
    server = Server(mood)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.over.set()
        server.shutdown()
        server.server_close()
