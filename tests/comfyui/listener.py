"""Queues a prompt as the front end does and listens until it ends; prints the events, and keeps the pictures.

python listener.py URL PROMPT FOLDER: PROMPT is a file in API form; previews become FOLDER/000.jpg, 001.jpg and so on.
"""

import asyncio
import json
import sys
from pathlib import Path

import aiohttp

CLIENT, SECONDS = "listener", 400
# A picture's message begins with what it is (1: a preview) and its format (1: JPEG), four bytes each.
PREVIEW = bytes((0, 0, 0, 1)) * 2
ENDS = {"execution_success", "execution_error", "execution_interrupted"}


async def main(url, prompt, folder):
    events, pictures = [], 0
    async with aiohttp.ClientSession() as session, session.ws_connect(f"{url}/ws?clientId={CLIENT}") as socket:
        body = {"prompt": json.loads(Path(prompt).read_text("utf-8")), "client_id": CLIENT}
        async with session.post(f"{url}/prompt", json=body) as answer:
            answer.raise_for_status()
        async for message in socket:
            if message.type == aiohttp.WSMsgType.BINARY and message.data.startswith(PREVIEW):
                (Path(folder) / f"{pictures:03}.jpg").write_bytes(message.data[len(PREVIEW) :])
                pictures += 1
            elif message.type == aiohttp.WSMsgType.TEXT:
                events.append(json.loads(message.data))
                if events[-1]["type"] in ENDS:
                    break
    sys.stdout.write(json.dumps(events))


if __name__ == "__main__":
    asyncio.run(asyncio.wait_for(main(*sys.argv[1:]), SECONDS))
