"""A server of a tiny model in a thread, for the tests that talk to it."""

from __future__ import annotations

import functools
import socket
import threading
import time
from typing import Any

import openai
import torch
import uvicorn
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

import irc
from irc.demo.tinypy import TinyPy, TinyPyConfig
from irc.runtime.engine import Engine
from irc.serving import Serving

CHARACTERS = 'abcdefghijklmnopqrstuvwxyz0123456789 {}[]":,.-_\n'
END = len(CHARACTERS)


@functools.cache
def tokenizer() -> Tokenizer:
    """A token a character, and one that ends a text."""
    byte_level = {" ": "Ġ", "\n": "Ċ"}
    vocabulary = {byte_level.get(c, c): i for i, c in enumerate(CHARACTERS)}
    made = Tokenizer(models.BPE(vocabulary, [], unk_token=None))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken("<end>", special=True)])
    assert made.token_to_id("<end>") == END
    return made


@functools.cache
def compiled() -> irc.Compiled:
    torch.manual_seed(0)
    config = TinyPyConfig(
        vocab_size=END + 1, hidden_size=32, num_layers=1, num_heads=4, intermediate_size=64, max_positions=256
    )
    model = TinyPy(config).eval()
    model.lm_head.weight = torch.nn.Parameter(torch.randn(END + 1, 32))
    ids = torch.randint(0, END, (2, 9))
    return irc.compile(
        model, "insert-kv-cache{layout=paged,block-size=8,max-length=160}", example_inputs=ids,
        dynamic=({0: "B", 1: "S"},), tokenizer=tokenizer(), verify="off",
    )  # fmt: skip


class Running:
    """A server in a thread."""

    def __init__(self, **options: Any) -> None:
        self.app = Serving(compiled(), name="tiny", **options).app
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        config = uvicorn.Config(self.app, port=self.port, log_level="error", timeout_graceful_shutdown=20)
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.url = f"http://127.0.0.1:{self.port}"

    @property
    def engine(self) -> Engine:
        return self.app.state.service.engine.engine

    def client(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(
            base_url=f"{self.url}/v1", api_key=options.pop("api_key", "none"), max_retries=0, **options
        )

    def __enter__(self) -> Running:
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        return self

    def __exit__(self, *_: object) -> None:
        self.server.should_exit = True
        self.thread.join(30)
        assert not self.thread.is_alive()


def expected(prompt: str, count: int) -> str:
    text = compiled().generate(prompt, max_new_tokens=count).text
    assert isinstance(text, str)
    return text
