"""A server on loopback that serves a tiny model as vLLM, SGLang, llama.cpp or another OpenAI-compatible one does, and as badly
as its faults say."""

import contextlib
import gc
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch

KINDS = ("vllm", "sglang", "llamacpp", "openai")
WRONG = {  # what it computes otherwise: each breaks a law
    "neighbours": "other requests under way change the numbers",
    "stale-cache": "a prompt that shares its beginning with an earlier one is read after that one's tokens",
    "leaks": "each request changes the numbers of the next",
    "decode": "generated tokens have other log-probabilities than the same tokens of a prompt",
    "chunks": "a long prompt forgets what came before the last chunk",
    "noise": "the same request has other numbers each time",
}
CACHED, CHUNK = 12, 64  # tokens of a block of the cache; of a chunk of a long prompt


class StubServer(ThreadingHTTPServer):
    """Serves a `Model`. Used as a context.

    faults    of WRONG, or of the answers: zeros, nan, short, other-ids, first, no-logprobs, other-model, no-ids, bad-tokenizer,
              no-tokenize
    statuses  of the next answers to completions: an HTTP status, "drop" for a dropped connection
    asked     (path, payload) of each request
    described path -> (status, JSON) that answers a GET in place of what this server says of itself
    altered   (payload, answer) -> the answer that is sent
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, lm, kind="vllm", *, name="stub", faults=(), longest=512, delay=0.0, templated=None,
                 described=None, altered=None):  # fmt: skip
        super().__init__(("127.0.0.1", 0), Answers)
        self.lm, self.kind, self.name, self.faults, self.longest, self.delay = lm, kind, name, set(faults), longest, delay
        self.templated, self.described = templated, described or {}
        self.altered = altered or (lambda payload, answer: answer)
        self.statuses, self.asked, self.keys = [], [], []
        self.lock, self.under_way, self.most_under_way, self.before = threading.RLock(), 0, 0, 0
        self.cache, self.generator = {}, torch.Generator().manual_seed(0)
        self.url = f"http://127.0.0.1:{self.server_port}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *error):
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):
        """Clients hang up."""

    @property
    def spec(self):
        return f"server:{self.url},tokenizer=bytes@fp32"

    def logprobs(self, ids):
        """[n, v] Log-probabilities of the token after each of ids [n], as its faults say."""
        ids = list(ids)
        if "stale-cache" in self.faults:
            before, self.cache[tuple(ids[: CACHED - 2])] = self.cache.get(tuple(ids[: CACHED - 2]), ids), ids
            ids = before[: min(CACHED, len(ids))] + ids[CACHED:] if len(before) >= CACHED else ids
        with self.lock, torch.no_grad():
            logits, _ = self.lm.step(torch.tensor([ids], device=self.lm.device))
            if "chunks" in self.faults and len(ids) > CHUNK:
                begin = (len(ids) - 1) // CHUNK * CHUNK
                later, _ = self.lm.step(torch.tensor([ids[begin:]]))
                logits = torch.cat([logits[:, :begin], later], 1)
        found = logits[0].double()
        scale = 1.0
        if "neighbours" in self.faults:
            scale += 0.2 * (self.under_way > 1)
        if "leaks" in self.faults:
            scale, self.before = 1 + self.before / 500, sum(ids) % 97
        if "noise" in self.faults:
            scale += 0.1 * torch.rand((), generator=self.generator).item()
        return torch.log_softmax(found * scale, -1)

    def scored(self, ids):
        """Of each token but the first its log-probability, and (log-probability, id) of all, the most likely first."""
        rows = self.logprobs(ids)[:-1]
        found = [row[token].item() for row, token in zip(rows, ids[1:], strict=True)]
        if "zeros" in self.faults:
            found = [0.0] * len(found)
        if "nan" in self.faults:
            found[-1] = float("nan")
        best = [[(value, token) for value, token in zip(*map(torch.Tensor.tolist, row.topk(20)), strict=True)] for row in rows]
        ranks = [1 + int((row > value).sum()) for row, value in zip(rows, found, strict=True)]
        return found, ranks, best

    def generated(self, ids, most, temperature, ends, stop, seed):
        """(ids, log-probabilities, whether it was cut) of an answer."""
        new, logprobs, generator = [], [], torch.Generator().manual_seed(seed or 0)
        while len(new) < most:
            row = self.logprobs([*ids, *new])[-1]
            token = int(row.argmax())
            if temperature:
                token = int(torch.multinomial((row / temperature).exp(), 1, generator=generator))
            logprobs.append(row[token].item() - (0.5 if "decode" in self.faults else 0.0))
            new.append(token)
            if token in ends or any(text in self.lm.tokenizer.decode(new) for text in stop):
                return new, logprobs, False
        return new, logprobs, True


class Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *args):
        """Quiet."""

    def do_GET(self):
        server, path = self.server, self.path
        if path in server.described:
            return self.reply(*server.described[path])
        owners = {"vllm": "vllm", "sglang": "sglang", "llamacpp": "llamacpp", "openai": "someone"}
        model = {"id": server.name, "owned_by": owners[server.kind], "max_model_len": server.longest}
        known = {
            "/v1/models": {"data": [model]},
            "/version": {"version": "0.0-stub"} if server.kind == "vllm" else None,
            "/get_server_info": {"version": "0.0-stub", "chunked_prefill_size": CHUNK} if server.kind == "sglang" else None,
            "/props": {"build_info": "stub", "default_generation_settings": {"n_ctx": server.longest}}
            if server.kind == "llamacpp"
            else None,
        }
        return self.reply(200 if known.get(path) else 404, known.get(path) or {"error": "no such path"})

    def do_POST(self):
        server = self.server
        payload = json.loads(self.rfile.read(int(self.headers["content-length"])))
        server.asked.append((self.path, payload))
        server.keys.append(self.headers.get("authorization"))
        if server.statuses and self.path != "/tokenize":
            status = server.statuses.pop(0)
            if status == "drop":
                self.close_connection = True
                self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 4000\r\n\r\n{")
                return None
            return self.reply(status, {"error": {"message": f"stub says {status}"}}, {"Retry-After": "0"})
        with server.lock:
            server.under_way += 1
            server.most_under_way = max(server.most_under_way, server.under_way)
        time.sleep(server.delay)
        try:
            answers = {
                "/v1/completions": self.vllm if server.kind == "vllm" else self.openai,
                "/generate": self.sglang,
                "/completion": self.llamacpp,
                "/tokenize": self.tokenize,
            }
            found = answers[self.path](payload) if self.path in answers else None
        finally:
            with server.lock:
                server.under_way -= 1
        if isinstance(found, dict) and "model" in found and "other-model" in server.faults:
            found["model"] = "another"
        if found is not None and self.path != "/tokenize":
            found = server.altered(payload, found)
        return self.reply(404 if found is None else 200, found or {"error": "no such path"})

    def tokenize(self, payload):
        server = self.server
        if server.kind == "openai" or "no-tokenize" in server.faults or ("messages" in payload and server.templated is None):
            return None
        if "messages" in payload:
            return {"tokens": server.templated(payload["messages"])}
        text = payload.get("prompt", payload.get("content"))
        shift = 1 if "bad-tokenizer" in server.faults else 0
        return {"tokens": [int(token) + shift for token in server.lm.tokenizer.encode(text)[0]]}

    def vllm(self, payload):
        server, ids = self.server, payload["prompt"]
        choice = {"index": 0, "prompt_token_ids": ids, "prompt_logprobs": None}
        if (top := payload.get("prompt_logprobs")) is not None and "no-logprobs" not in server.faults:
            found, ranks, best = server.scored(ids)
            entries = [None]
            for token, value, rank, most in zip(ids[1:], found, ranks, best, strict=True):
                entry = {str(t): {"logprob": v, "rank": place} for place, (v, t) in enumerate(most[:top], start=1)}
                entry[str(token)] = {"logprob": value, "rank": rank}
                entries.append(entry)
            if "short" in server.faults:
                entries.pop()
            if "first" in server.faults:
                entries[0] = entries[1]
            if "other-ids" in server.faults:
                choice["prompt_token_ids"] = [*ids[:-1], ids[-1] ^ 1]
            choice["prompt_logprobs"] = entries
        new, logprobs, cut = server.generated(
            ids, payload.get("max_tokens", 16), payload.get("temperature", 0.8), payload.get("stop_token_ids", ()),
            payload.get("stop", ()), payload.get("seed"),
        )  # fmt: skip
        choice |= {"text": server.lm.tokenizer.decode(new), "token_ids": new, "finish_reason": "length" if cut else "stop"}
        choice["logprobs"] = {"token_logprobs": logprobs}
        return {"model": server.name, "choices": [choice]}

    def openai(self, payload):
        server, ids = self.server, payload["prompt"]
        if isinstance(ids, str):
            ids = [int(token) for token in server.lm.tokenizer.encode(ids)[0]]
            ids = [0] * ("adds-bos" in server.faults) + ids
        elif "no-ids" in server.faults:
            return None
        echoed, texts = payload.get("echo"), [server.lm.tokenizer.decode([token]) for token in ids]
        new, _, cut = server.generated(
            ids,
            payload.get("max_tokens", 16),
            payload.get("temperature", 0.8),
            (),
            payload.get("stop", ()),
            payload.get("seed"),
        )
        choice = {"text": server.lm.tokenizer.decode(new), "finish_reason": "length" if cut else "stop"}
        if echoed and "no-logprobs" not in server.faults:
            found, _, best = server.scored(ids)
            tops = [None, *({server.lm.tokenizer.decode([t]): v for v, t in most[:5]} for most in best)]
            choice["logprobs"] = {"tokens": [*texts, "x"], "token_logprobs": [None, *found, -1.0], "top_logprobs": [*tops, {}]}
        return {"model": server.name, "choices": [choice], "usage": {"prompt_tokens": len(ids)}}

    def sglang(self, payload):
        server, ids, parameters = self.server, payload["input_ids"], payload["sampling_params"]
        new, logprobs, cut = server.generated(
            ids, parameters["max_new_tokens"], parameters.get("temperature", 0.8), parameters.get("stop_token_ids", ()),
            parameters.get("stop", ()), parameters.get("sampling_seed"),
        )  # fmt: skip
        meta = {"prompt_tokens": len(ids), "finish_reason": {"type": "length" if cut else "stop"}}
        meta["output_token_logprobs"] = [[value, token, None] for value, token in zip(logprobs, new, strict=True)]
        if (start := payload.get("logprob_start_len", -1)) >= 0:
            found, _, best = server.scored(ids)
            rows = [[value, token, None] for value, token in zip(found, ids[1:], strict=True)][start:]
            meta["input_token_logprobs"] = [[None, ids[start], None], *rows]
            tops = [[[value, token, None] for value, token in most[: payload["top_logprobs_num"]]] for most in best]
            meta["input_top_logprobs"] = [None, *tops[start:]]
        return {"text": server.lm.tokenizer.decode(new), "output_ids": new, "meta_info": meta}

    def llamacpp(self, payload):
        server, ids = self.server, payload["prompt"]
        new, logprobs, cut = server.generated(
            ids, payload["n_predict"], payload["temperature"], (), payload["stop"], payload["seed"]
        )
        return {
            "model": server.name,
            "content": server.lm.tokenizer.decode(new),
            "tokens": new,
            "tokens_evaluated": len(ids),
            "stop_type": "limit" if cut else "word",
            "completion_probabilities": [{"id": t, "logprob": v} for t, v in zip(new, logprobs, strict=True)],
        }

    def reply(self, status, found, headers=()):
        raw = json.dumps(found).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": len(raw), **dict(headers)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(raw)


@contextlib.contextmanager
def stubs(demo):
    """A function that starts a stub which serves a model; all end with the block."""
    running = []

    def start(kind="vllm", **options):
        running.append(StubServer(demo, kind, **options).__enter__())
        return running[-1]

    try:
        yield start
    finally:
        gc.collect()  # clients close their connections
        for server in running:
            server.__exit__()
