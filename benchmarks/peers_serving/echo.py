# requires: uvicorn==0.54.0 httptools==0.9.0
# path: /
"""No server does less: an ASGI application under uvicorn and httptools that reads the body and returns a fixed one."""

from __future__ import annotations

import sys

import uvicorn


def main(port: int, answer_bytes: int) -> None:
    """Serve; the answer is as long as the one it stands beside."""
    answer = b"x" * answer_bytes
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(answer)).encode())]

    async def app(scope, receive, send):
        more = True
        while more:
            message = await receive()
            more = message.get("more_body", False)
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": answer})

    uvicorn.run(app, port=port, http="httptools", loop="asyncio", ws="none", lifespan="off", log_level="warning",
                access_log=False, server_header=False, proxy_headers=False)  # fmt: skip


main(int(sys.argv[2]), int(sys.argv[4]))
