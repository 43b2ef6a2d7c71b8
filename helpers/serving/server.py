"""transformers' own server, on loopback, over models that are loaded once and chosen by name."""

import copy
import dataclasses
import socket
import webbrowser
from pathlib import Path
from threading import Lock

import uvicorn
from fastapi import HTTPException
from fastapi.middleware.trustedhost import TrustedHostMiddleware
from fastapi.responses import FileResponse, JSONResponse
from transformers import GenerationConfig
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import GenerationState

from helpers import prompts
from helpers.answers import inference
from helpers.config import Config
from helpers.merging.merging import check_adapter
from helpers.model import loading


class Served:
    """One of `inference.MODELS`, or `model` by its adapter of a name; with its template and EOS."""

    def __init__(self, config: Config, which: str, turn: Lock, model=None, adapter=None):
        self.model = model or inference.load(config, which)
        self.adapter, self.device, self.config = adapter, self.model.device, self.model.config
        self.turn, self.system = turn, inference.system_message(config, which)
        self.tokenizer = tokenizer = loading.load_tokenizer(config.model_name)
        self.marks = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
        if inference.template_of(config, which) == "llama2":
            tokenizer.chat_template = prompts.chat_template(self.system)
            self.marks |= {*prompts.MARKERS}
        eos, pad = inference.end_tokens(self.model, tokenizer), tokenizer.pad_token_id
        self.generation_config = GenerationConfig(eos_token_id=eos, pad_token_id=pad)

    def generate(self, generation_config: GenerationConfig, **inputs):
        """The model's own `generate`: greedy, unless the request has a temperature above 0."""
        generation_config.do_sample = (generation_config.temperature or 0) > 0
        chosen = {"adapter_names": [self.adapter]} if self.adapter else {}
        with self.turn:
            return self.model.generate(generation_config=generation_config, **inputs, **chosen)

    def conversation(self, messages: list[dict]) -> list[dict]:
        """The messages, a system message at their head; ValueError for what cannot be asked."""
        roles = [message.get("role") for message in messages]
        if roles[-1:] != ["user"] or {*roles} - {"system", "user", "assistant"}:
            raise ValueError(f"the roles are {roles}: use system, user, assistant; end with user")
        if held := [mark for mark in self.marks if mark in str(messages)]:
            raise ValueError(f"a message holds the template's own {held[0]}: reword it")
        first = {"role": "system", "content": self.system}
        return messages if roles[0] == "system" else [first, *messages]


def load(config: Config, names: list[str], also: dict[str, str]) -> dict[str, Served]:
    """Models by name: of `inference.MODELS`; `base`, at its best; the adapters of other runs.

    Raises what `inference.load` and `check_adapter` do, ValueError for an adapter's bad name.
    """
    at_best = "base_chat" if loading.load_tokenizer(config.model_name).chat_template else "base"
    turn = Lock()
    models = {name: Served(config, at_best if name == "base" else name, turn) for name in names}
    for name, run_dir in also.items():
        if not name.isidentifier() or name in (*models, "tuned", "default"):
            raise ValueError(f"an adapter cannot be called {name!r}: take another name, of letters")
        other = dataclasses.replace(config, run_dir=run_dir)
        folder, tuned = check_adapter(other), models.get("tuned") or Served(config, "tuned", turn)
        tuned.model.load_adapter(str(folder), name, autocast_adapter_dtype=False)
        tuned.adapter = "default"  # as peft calls the first
        models |= {"tuned": tuned, name: Served(other, "tuned", turn, tuned.model, name)}
    return models


class Chat(ChatCompletionHandler):
    """Chooses a model by name, and reads answers as notebook 06 does."""

    def __init__(self, models: dict[str, Served], max_new_tokens: int):
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
        content = prompts.read_completion(content)
        return super()._build_completion(request_id, content, *given, **named)

    def _build_chunk_sse(self, *given, content: str | None = None, **named):
        if content:  # both ends of a streamed answer, too, are cut as `read_completion` cuts
            before, self.text = prompts.read_completion(self.text), self.text + content
            content = prompts.read_completion(self.text)[len(before) :]
        return super()._build_chunk_sse(*given, content=content, **named)


async def refuse(request, error) -> JSONResponse:
    """An error in the form in which OpenAI's client shows its sentence."""
    message = {"message": str(getattr(error, "detail", error))}
    return JSONResponse({"error": message}, getattr(error, "status_code", 400))


def application(models: dict[str, Served], max_new_tokens: int):
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
    """Serve until Ctrl-C. Raises OSError for a port in use, and what `load` raises."""
    try:
        listening = socket.create_server(("127.0.0.1", port))
    except (OSError, OverflowError) as error:
        raise OSError(f"port {port} cannot be had ({error}): choose another --port") from None
    with listening:
        models = load(config, names, also)
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        print(f"{url}/v1 serves {', '.join(models)} to this machine only (loopback)", flush=True)
        if page:
            webbrowser.open(url)
        app = application(models, config.max_new_tokens)
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listening])
