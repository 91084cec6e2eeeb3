"""The official Python client against a running server: openai_client.py URL MODEL."""

import json
import sys
import threading

import openai

url, model = sys.argv[1:]
client = openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0, timeout=60)
question = [{"role": "user", "content": "What is the capital of France?"}]


def chat(**more):
    arguments = {"model": model, "messages": question, "max_tokens": 24, "temperature": 0}
    return client.chat.completions.create(**{**arguments, **more})


# Whole and streamed answers agree, with a log-probability and an id for every token.
whole = chat(logprobs=True, top_logprobs=3, extra_body={"return_token_ids": True})
text, entries, ids, usage = "", [], [], None
stream = chat(logprobs=True, top_logprobs=3, stream=True, stream_options={"include_usage": True})
for chunk in stream:
    usage = chunk.usage or usage
    for choice in chunk.choices:
        text += choice.delta.content or ""
        entries += choice.logprobs.content if choice.logprobs else []
        ids += getattr(choice, "token_ids", None) or []
assert "Paris" in text, text
assert text == whole.choices[0].message.content
assert [e.logprob for e in entries] == [e.logprob for e in whole.choices[0].logprobs.content]
assert ids == whole.choices[0].token_ids and len(ids) == usage.completion_tokens
assert usage.prompt_tokens == whole.usage.prompt_tokens
assert usage.prompt_tokens_details.cached_tokens > 0
assert all(len(e.top_logprobs) == 3 for e in entries)

# Completions, prompts as ids, echo with scores.
scored = client.completions.create(
    model=model, prompt=[[504, 3575], [504]], max_tokens=1, echo=True, logprobs=1
)
assert len(scored.choices) == 2 and scored.choices[0].logprobs.token_logprobs[0] is None
assert scored.choices[0].logprobs.token_logprobs[1] < 0

# Structured output and tools.
schema = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}},
          "required": ["city"], "additionalProperties": False}
answer = chat(response_format={"type": "json_schema",
                               "json_schema": {"name": "c", "schema": schema}})
assert json.loads(answer.choices[0].message.content)["city"] in ("Paris", "Rome"), answer
tool = {"type": "function", "function": {"name": "look_up", "parameters": schema}}
calls = chat(tools=[tool], tool_choice="required", max_tokens=60).choices[0].message.tool_calls
assert calls[0].function.name == "look_up" and "city" in calls[0].function.arguments

# Errors arrive as the client's own exceptions, with the field at fault.
for arguments, kind, param in [
    ({"temperature": -1}, openai.BadRequestError, "temperature"),
    ({"max_tokens": 0}, openai.BadRequestError, "max_tokens"),
    ({"model": "absent"}, openai.NotFoundError, "model"),
]:
    try:
        chat(**arguments)
        raise SystemExit(f"{arguments} was accepted")
    except kind as error:
        assert error.param == param, error

# Aborted streams end their sequences.
def abort():
    stream = chat(max_tokens=400, stream=True, extra_body={"ignore_eos": True})
    next(iter(stream))
    stream.close()

threads = [threading.Thread(target=abort) for _ in range(8)]
[t.start() for t in threads]
[t.join() for t in threads]
assert client.models.list().data[0].id == model
assert client.models.retrieve(model).id == model
print(f"openai {openai.__version__} (Python): whole, streamed, echo, schema, tools, errors, aborts")
