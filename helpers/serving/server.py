"""transformers' own server, on loopback, over models that are loaded once and chosen by name."""

import copy
import socket
import webbrowser
from pathlib import Path

import uvicorn
from fastapi import HTTPException
from fastapi.middleware.trustedhost import TrustedHostMiddleware
from fastapi.responses import FileResponse, JSONResponse
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import GenerationState

from helpers.config import Config
from helpers.prompts import read_completion
from helpers.serving import served


class Chat(ChatCompletionHandler):
    """Chooses a model by name, and reads answers as notebook 06 does."""

    def __init__(self, models: dict[str, served.Served], max_new_tokens: int):
        super().__init__(ModelManager(), GenerationState())
        self.models, self.limit, self.text = models, {"max_tokens": max_new_tokens}, ""

    def _resolve_model(self, body: dict):
        name, known = body.get("model"), " or ".join(self.models)
        if name not in self.models:
            raise HTTPException(404, f"no model is called {name!r} here: choose {known}")
        return name, self.models[name], self.models[name].tokenizer

    async def handle_request(self, body: dict, request_id: str):
        body = self.limit | {name: value for name, value in body.items() if value is not None}
        if (most := int(body.get("max_completion_tokens", body["max_tokens"]))) < 1:
            raise ValueError(f"max_tokens is {most}: ask for 1 or more")
        body["messages"] = self._resolve_model(body)[1].conversation(body.get("messages", []))
        return await super(Chat, copy.copy(self)).handle_request(body, request_id)  # own `text`

    def _build_completion(self, request_id: str, content: str, *given, **named):
        return super()._build_completion(request_id, read_completion(content), *given, **named)

    def _build_chunk_sse(self, *given, content: str | None = None, **named):
        if content:  # both ends of a streamed answer, too, are cut as `read_completion` cuts
            before, self.text = self.text, self.text + content
            content = read_completion(self.text)[len(read_completion(before)) :]
        return super()._build_chunk_sse(*given, content=content, **named)


async def refuse(request, error) -> JSONResponse:
    """An error in the form in which OpenAI's client shows its sentence."""
    message = {"message": str(getattr(error, "detail", error))}
    return JSONResponse({"error": message}, getattr(error, "status_code", 400))


def application(models: dict[str, served.Served], max_new_tokens: int):
    """The server without its socket."""
    chat = Chat(models, max_new_tokens)
    app = build_server(chat.model_manager, chat, None, None, None, None, chat.generation_state)
    # Its other routes load models of any name, put all away, or ask without our template.
    app.router.routes = [route for route in app.routes if route.path == "/v1/chat/completions"]
    named = [{"id": name, "object": "model", "owned_by": "you"} for name in models]
    app.add_api_route("/v1/models", lambda: {"object": "list", "data": named})
    app.add_api_route("/", lambda: FileResponse(Path(__file__).with_name("chat.html")))
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"])
    app.exception_handlers |= {HTTPException: refuse, ValueError: refuse}
    return app


def run(config: Config, names: list[str], also: dict, port: int, page: bool) -> None:
    """Serve until Ctrl-C. Raises OSError for a port in use, and what `served.load` raises."""
    try:
        listening = socket.create_server(("127.0.0.1", port))
    except (OSError, OverflowError) as error:
        raise OSError(f"port {port} cannot be had ({error}): choose another --port") from None
    with listening:
        models = served.load(config, names, also)
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        print(f"{url}/v1 serves {', '.join(models)} to this machine only (loopback)", flush=True)
        if page:
            webbrowser.open(url)
        app = application(models, config.max_new_tokens)
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listening])
