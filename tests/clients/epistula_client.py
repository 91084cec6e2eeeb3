"""A validator's client against a running miner, with the wallet library of the network.

    epistula_client.py MINER_URL MODEL MINER_HOTKEY_SS58 WALLET_DIR_OR_SEED_HEX

`pip install openai==3.57.0 bittensor_wallet==4.1.1`. The wallet's hotkey must be a registered
validator with enough stake on the miner's chain. One line for each check; exit code 1 where one
fails.
"""

import functools
import hashlib
import json
import math
import pathlib
import sys
import time
import uuid

import httpx2
import openai
from bittensor_wallet import Keypair, Wallet

TEMPERATURE, MAX_TOKENS, SEED = 0.7, 24, 48123
QUESTION = [{"role": "user", "content": "Why is the sky blue?"}]


def load_key(source):
    """The hotkey of a wallet's directory, or of a seed's 64 digits."""
    directory = pathlib.Path(source).expanduser()
    if not directory.is_dir():
        return Keypair.create_from_seed("0x" + source.removeprefix("0x"))
    names = [f.name for f in (directory / "hotkeys").iterdir() if not f.name.endswith("pub.txt")]
    name = "default" if "default" in names else min(names)
    return Wallet(name=directory.name, hotkey=name, path=str(directory.parent)).hotkey


url, model, miner, source = sys.argv[1:]
url = url.rstrip("/")
key = load_key(source)
raw = httpx2.Client(base_url=url, timeout=60)


# Requests, signed.


def now_ms():
    return round(time.time() * 1000)


def sign(signer, text):
    return "0x" + signer.sign(text.encode()).hex()


def epistula(body, signer=key, receiver=miner, timestamp=None, is_wrapped=False):
    """Headers of version 2 for the bytes of a body."""
    timestamp = now_ms() if timestamp is None else timestamp
    name = str(uuid.uuid4())
    message = f"{hashlib.sha256(body).hexdigest()}.{name}.{timestamp}.{receiver}"
    if is_wrapped:
        message = f"<Bytes>{message}</Bytes>"
    headers = {
        "Epistula-Version": "2",
        "Epistula-Timestamp": str(timestamp),
        "Epistula-Uuid": name,
        "Epistula-Signed-By": signer.ss58_address,
        "Epistula-Signed-For": receiver,
        "Epistula-Request-Signature": sign(signer, message),
    }
    interval = math.ceil(timestamp / 1e4) * 1e4  # a float, and printed as one
    for i in range(3):
        headers[f"Epistula-Secret-Signature-{i}"] = sign(signer, f"{interval - 1 + i}.{receiver}")
    return headers


def btauth(method, path, body, receiver=miner):
    """Headers of btauth/1, which sign method and path too."""
    nonce = str(time.time_ns())
    lines = ["btauth/1", "sr25519", method, path, hashlib.sha256(body).hexdigest(), nonce]
    return {
        "X-Bittensor-Version": "1",
        "X-Bittensor-Hotkey": key.ss58_address,
        "X-Bittensor-Receiver": receiver,
        "X-Bittensor-Nonce": nonce,
        "X-Bittensor-Signature": sign(key, "\n".join([*lines, key.ss58_address, receiver])),
    }


def sign_inference(request):
    request.headers.update(epistula(request.read()))
    request.headers["X-Targon-Model"] = model


client = openai.OpenAI(
    base_url=f"{url}/v1", api_key="sn4", max_retries=0, timeout=60,
    http_client=openai.DefaultHttpxClient(event_hooks={"request": [sign_inference]}),
)


def chat_body(**more):
    body = {"seed": SEED, "max_tokens": 1, "temperature": TEMPERATURE, "model": model,
            "messages": QUESTION}
    return json.dumps({**body, **more}).encode()


def post(path, body, headers):
    return raw.post(path, content=body, headers={"Content-Type": "application/json", **headers})


# What is expected of responses.


def refused(response, status, detail=None):
    """An error as FastAPI would write it."""
    assert response.status_code == status, f"status {response.status_code}: {response.text[:200]}"
    body = response.json()
    assert set(body) == {"detail"} and isinstance(body["detail"], str), body
    assert detail in (None, body["detail"]), body
    return body["detail"]


def ok(response):
    assert response.status_code == 200, f"status {response.status_code}: {response.text[:200]}"
    return response.json()


def tokens(chunks, names_and_text):
    """Ids and text of a stream, read as strictly as a validator must fear."""
    ids, text, reason = [], "", None
    for place, chunk in enumerate(chunks):
        assert len(chunk.choices) == 1, f"chunk {place} has {len(chunk.choices)} choices"
        choice = chunk.choices[0]
        names, logprobs, piece = names_and_text(choice)
        if not names:
            # Only before the first token: later ones would be taken for a token.
            assert not ids and not piece, f"chunk {place} has no token"
            continue
        extra = choice.model_extra
        assert reason is None, f"chunk {place} follows the end"
        assert len(extra["token_ids"]) == 1, f"chunk {place} has tokens {extra['token_ids']}"
        assert names == [f"token_id:{extra['token_ids'][0]}"], f"chunk {place} names {names}"
        assert type(extra["powv"]) is int, f"chunk {place} has powv {extra['powv']!r}"
        assert len(logprobs) == 1 and -9999 <= logprobs[0] < 1e-3, f"chunk {place}: {logprobs}"
        ids, text, reason = ids + extra["token_ids"], text + piece, choice.finish_reason
    assert reason in ("stop", "length"), f"finish_reason {reason}"
    assert 0 < len(ids) <= MAX_TOKENS and text, f"{len(ids)} tokens, text {text!r}"
    assert reason == "stop" or len(ids) == MAX_TOKENS, f"{len(ids)} tokens end by {reason}"
    return ids, text


def of_chat(choice):
    entries = (choice.logprobs and choice.logprobs.content) or []
    return [e.token for e in entries], [e.logprob for e in entries], choice.delta.content or ""


def of_completion(choice):
    logprobs = choice.logprobs
    if logprobs is None:
        return [], [], choice.text
    return logprobs.tokens, logprobs.token_logprobs, choice.text


# The checks.

checks = []


def check(name):
    return lambda function: checks.append((name, function))


@check("GET /models lists the model")
def _():
    names = ok(raw.get("/models", headers=epistula(b"")))
    assert isinstance(names, list) and all(isinstance(n, str) for n in names), names
    assert model in names, names
    return ", ".join(names)


@check("POST /models takes a validator's models and answers with those that are served")
def _():
    body = json.dumps([model, "another/model-é"]).encode()
    answer = ok(post("/models", body, epistula(body)))
    assert answer == [model], answer


@check("chat stream, named as the extra body asks")
def _():
    stream = client.chat.completions.create(
        model=model, messages=QUESTION, stream=True, logprobs=True, seed=SEED,
        temperature=TEMPERATURE, max_tokens=MAX_TOKENS,
        extra_body={"return_tokens_as_token_ids": True},
    )
    ids, text = tokens(stream, of_chat)
    return f"{len(ids)} tokens, {text[:40]!r}"


@check("chat stream, asked as validators ask")
def _():
    stream = client.chat.completions.create(
        model=model, messages=QUESTION, stream=True, logprobs=True, seed=SEED,
        temperature=TEMPERATURE, max_tokens=MAX_TOKENS,
    )
    ids, text = tokens(stream, of_chat)
    return f"{len(ids)} tokens, {text[:40]!r}"


@check("completion stream, logprobs: true")
def _():
    stream = client.completions.create(
        model=model, prompt="The sky is blue because", stream=True, logprobs=True, seed=SEED,
        temperature=TEMPERATURE, max_tokens=MAX_TOKENS,
    )
    ids, text = tokens(stream, of_completion)
    return f"{len(ids)} tokens, {text[:40]!r}"


@check("the same signed request a second time")
def _():
    body = chat_body()
    headers = {**epistula(body), "X-Targon-Model": model}
    ok(post("/v1/chat/completions", body, headers))
    return refused(post("/v1/chat/completions", body, headers), 400)


@check("the same signature on another route")
def _():
    headers = epistula(b"[]")
    ok(post("/models", b"[]", headers))
    return refused(post("/v1/chat/completions", b"[]", headers), 400)


@check("no signature, on every route")
def _():
    unsigned = functools.partial(refused, status=400, detail="Unknown Epistula version")
    unsigned(raw.get("/models"))
    for path in ("/models", "/v1/chat/completions", "/v1/completions"):
        unsigned(post(path, chat_body(), {}))


def refusal(name, status, detail=None, change=lambda headers: headers, body=None, **how):
    """A request that must be refused: its headers made `how`, then changed."""
    def run():
        signed = chat_body()
        headers = change(epistula(signed, **how))
        return refused(post("/v1/chat/completions", body or signed, headers), status, detail)

    checks.append((name, run))


def without(name):
    return lambda headers: {k: v for k, v in headers.items() if k != name}


def with_(name, value):
    return lambda headers: {**headers, name: value}


SIGNATURE, TIMESTAMP = "Epistula-Request-Signature", "Epistula-Timestamp"
stranger = Keypair.create_from_mnemonic(Keypair.generate_mnemonic(12))
refusal("another version", 400, "Unknown Epistula version", with_("Epistula-Version", "1"))
refusal("another receiver", 400, "Bad Request, message is not intended for self",
        receiver=stranger.ss58_address)
refusal("a signer unknown to the chain", 401, "Signer not in metagraph", signer=stranger)


@check("a timestamp 9 s old")
def _():
    headers = epistula(b"[]", timestamp=now_ms() - 9000)
    refused(post("/models", b"[]", headers), 400, "Request is too stale")


@check("a timestamp 9 s ahead")
def _():
    return refused(post("/models", b"[]", epistula(b"[]", timestamp=now_ms() + 9000)), 400)


refusal("a body changed after signing", 400, "Signature Mismatch", body=chat_body(max_tokens=2))
refusal("another's signature", 400, "Signature Mismatch",
        lambda headers: {**headers, SIGNATURE: epistula(chat_body(), signer=stranger)[SIGNATURE]})
refusal("no request signature", 400, "Invalid Signature", without(SIGNATURE))
refusal("a signature that is not hexadecimal", 400, change=with_(SIGNATURE, "0x" + "zz" * 64))
refusal("a signature cut short", 400, change=with_(SIGNATURE, "0x" + "ab" * 63))
refusal("a timestamp that is no number", 400, change=with_(TIMESTAMP, "yesterday"))
refusal("a timestamp beyond 64 bits", 400, change=with_(TIMESTAMP, "9" * 40))
refusal("no timestamp", 400, change=without(TIMESTAMP))
refusal("no uuid", 400, "Invalid uuid", without("Epistula-Uuid"))


@check("a signature over <Bytes>message</Bytes>")
def _():
    body = chat_body()
    ok(post("/v1/chat/completions", body, epistula(body, is_wrapped=True)))


@check("btauth/1")
def _():
    body, path = chat_body(), "/v1/chat/completions"
    assert model in ok(raw.get("/models", headers=btauth("GET", "/models", b"")))
    headers = btauth("POST", path, body)
    ok(post(path, body, headers))
    for response in (post(path, body, headers), post(path, body, btauth("GET", path, body))):
        assert 400 <= response.status_code < 500, f"status {response.status_code}"
    return "and neither a second time nor with another method"


def main():
    failures = 0
    for name, function in checks:
        try:
            found = function()
        except Exception as error:
            failures += 1
            print(f"FAIL {name}: {type(error).__name__}: {str(error)[:300]}")
        else:
            print(f"ok   {name}" + (f": {found}" if found else ""))
    raw.close()
    client.close()
    if failures:
        raise SystemExit(f"{failures} of {len(checks)} checks failed")
    print(f"openai {openai.__version__} (Python), signed by bittensor_wallet: {len(checks)} checks")


if __name__ == "__main__":
    main()
