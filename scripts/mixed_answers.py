#!/usr/bin/env python3
"""Answers of a `targon-engine serve` to mixed prompts, as `verify` and other_stack.py read them.

    mixed_answers.py URL COUNT FILE [--seed N] [--tokens N] [--streams N]

Of the prompts 45 % are chats, 33 % pieces of this project's code, documents and licence, 10 % texts in
other languages, 8 % one to eighty random ids, and 4 % whitespace alone. Temperatures are uniform
below 1, and 0 for an eighth of them; answers have 32 to 256 tokens at most. The same seed gives the
same requests, as far as the model's tokenizer is the same.
"""

import argparse
import concurrent.futures
import json
import pathlib
import random
import urllib.request

LEAST_TOKENS = 32
PIECE = (200, 2000)  # characters of a piece of a file
SUBJECTS = ("bread", "the Moon", "bicycles", "winter", "honey bees", "maps", "volcanoes", "old trees",
            "trains", "glass", "chess", "salt", "rivers", "coffee", "gravity", "libraries", "bridges",
            "wolves", "clocks", "rain", "computers", "sleep", "gardens", "money", "whales",
            "electricity", "vaccines", "football", "magnets", "dreams", "steel", "fire", "tides")
TASKS = ("Explain {} to a child.", "Write a poem about {}.", "List five facts about {}.",
         "What would the world be without {}?", "Write a Python function that has to do with {}.",
         "Tell a short story in which {} matters.", "Name two common mistakes about {}.",
         "Compare {} with something unlike it.", "Give me a recipe that mentions {}.",
         "Write a letter of complaint about {}.", "Who first studied {}, and why?",
         "Summarise what is known about {} in one sentence.")
STYLES = ("", " Be brief.", " Use a table.", " Answer in French.", " Think step by step.",
          " Answer as JSON.", " Use no adjectives.", " Do not mention its history.")
LANGUAGES = (
    "Der Zug fährt um acht Uhr ab, und wer zu spät kommt, muss bis zum Abend warten.",
    "La lluvia caía sobre los tejados del pueblo mientras los niños miraban por la ventana.",
    "Les marchés du matin ferment à midi, mais le boulanger reste ouvert jusqu'au soir.",
    "Зимой река замерзает, и по льду можно дойти до другого берега.",
    "今天的天气很好，我们决定去山上看日出，然后在河边吃早饭。",
    "駅前の本屋は毎週金曜日に新しい雑誌を店先に並べます。",
    "도서관은 아침 아홉 시에 문을 열고 저녁에는 여섯 시에 닫습니다.",
    "تفتح المكتبة أبوابها في الصباح ويجلس الطلاب قرب النوافذ.",
    "सुबह की पहली बस पहाड़ के गाँव से निकलकर शहर तक जाती है।",
    "Ο ψαράς γυρίζει στο λιμάνι πριν βραδιάσει και απλώνει τα δίχτυα του.",
    "Kış gelince göçmen kuşlar güneye uçar, köyde yalnız serçeler kalır.",
    "Rano piekarz otwiera okno i cała ulica pachnie świeżym chlebem.",
)


class Server:
    """The server that answers."""

    def __init__(self, url):
        self.url = url.rstrip("/")
        self.model = self.ask("/v1/models")["data"][0]["id"]

    def ask(self, path, body=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=3600) as response:
            return json.load(response)

    def ids(self, text):
        return self.ask("/tokenize", {"prompt": text})["tokens"]

    def capture(self, body):
        path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
        return {"request": body, "response": self.ask(path, body)}


def files():
    """The texts of this project."""
    root = pathlib.Path(__file__).resolve().parent.parent
    kinds = ("src/**/*.rs", "kernels/*.cu*", "docs/*.md", "scripts/*.py", "LICENSE", "*.md", "*.toml")
    return [path.read_text() for kind in kinds for path in sorted(root.glob(kind))]


def whitespace(draw):
    return "".join(draw.choice((" ", "\n", "\t", "\n\n", "    ")) for _ in range(draw.randint(1, 12)))


def question(server, draw, texts):
    """What a request asks: its messages, or the ids of its prompt."""
    kind = draw.random()
    if kind < 0.45:
        text = draw.choice(TASKS).format(draw.choice(SUBJECTS)) + draw.choice(STYLES)
        return {"messages": [{"role": "user", "content": text}]}
    if kind < 0.78:
        text = draw.choice(texts)
        start = draw.randrange(max(1, len(text) - PIECE[0]))
        prompt = server.ids(text[start:start + draw.randint(*PIECE)])
    elif kind < 0.88:
        prompt = server.ids(" ".join(draw.sample(LANGUAGES, draw.randint(1, 3))))
    elif kind < 0.96:
        prompt = [draw.randrange(1000, 40000) for _ in range(draw.randint(1, 80))]
    else:
        prompt = server.ids(whitespace(draw))
    return {"prompt": prompt}


def body(server, draw, texts, most):
    temperature = 0 if draw.random() < 1 / 8 else round(draw.random(), 3)
    return {
        "model": server.model, **question(server, draw, texts), "temperature": temperature,
        "max_tokens": draw.randint(min(LEAST_TOKENS, most), most), "return_token_ids": True,
        "proof": {"scheme": "residue-v1", "nonce": draw.randbytes(32).hex()},
    }


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("url")
    parser.add_argument("count", type=int)
    parser.add_argument("file", type=pathlib.Path)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=256, help="the most tokens of an answer")
    parser.add_argument("--streams", type=int, default=16, help="requests at once")
    return parser.parse_args()


def main():
    args = arguments()
    server, draw, texts = Server(args.url), random.Random(args.seed), files()
    bodies = [body(server, draw, texts, args.tokens) for _ in range(args.count)]
    with args.file.open("w") as file:
        with concurrent.futures.ThreadPoolExecutor(args.streams) as streams:
            for answer in streams.map(server.capture, bodies):
                file.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
