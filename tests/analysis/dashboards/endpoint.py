"""An OpenAI-compatible endpoint on this machine, over HTTP as it is spoken, that answers by rule."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer


class Endpoint(BaseHTTPRequestHandler):
    """Names a unit by the first marked token, and finds the passages that have that token."""

    def do_POST(self):
        self.server.seen.append(dict(self.headers))
        prompt = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"][0]["content"]
        if self.server.answer is not None:
            status, content = self.server.answer
        elif "Fits:" in prompt:
            name = prompt.split("described as: ")[1].split("\n")[0]
            fits = [line.split(".")[0] for line in prompt.splitlines() if line[:1].isdigit() and name in line]
            status, content = 200, ", ".join(fits) or "none"
        else:
            status, content = 200, f"Name: {prompt.split('1. ')[1].split('<<')[1].split('>>')[0].strip()}\n(more)"
        body = json.dumps({"choices": [{"message": {"content": content}}]}) if status == 200 else "broken"
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_):
        pass


@contextmanager
def serving() -> Iterator[HTTPServer]:
    """`seen` are the headers of what it was asked, `answer` a (status, content) that it gives in place of its own."""
    server = HTTPServer(("127.0.0.1", 0), Endpoint)
    server.answer, server.seen = None, []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
