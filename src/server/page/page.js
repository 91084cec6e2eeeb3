// Chat with a model of this server and look at every token: probability, alternatives, powv, proof.
'use strict';

const $ = (id) => document.getElementById(id);
const messages = [];
let running = null; // AbortController of the answer that streams

function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  Object.assign(node, attributes);
  node.append(...children);
  return node;
}

function headers() {
  const key = $('key').value;
  return { 'content-type': 'application/json', ...(key && { authorization: `Bearer ${key}` }) };
}

async function listModels() {
  const response = await fetch('/v1/models', { headers: headers() });
  const body = await response.json();
  if (!response.ok) throw new Error(body.error.message);
  const options = body.data.map((m) => {
    const text = m.status === 'ready' ? m.id : `${m.id} (${m.status})`;
    return element('option', { value: m.id, textContent: text });
  });
  $('model').replaceChildren(...options);
}

function request() {
  const number = (id) => ($(id).value === '' ? undefined : Number($(id).value));
  return {
    model: $('model').value,
    messages,
    stream: true,
    stream_options: { include_usage: true },
    logprobs: true,
    top_logprobs: 5,
    temperature: number('temperature'),
    max_tokens: number('max_tokens'),
    seed: number('seed'),
    proof: $('proof').value ? { scheme: $('proof').value } : undefined,
  };
}

// The JSON of each server-sent event.
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let held = '';
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    held += value;
    const frames = held.split('\n\n');
    held = frames.pop();
    for (const frame of frames) {
      if (frame === 'data: [DONE]') return;
      yield JSON.parse(frame.slice('data: '.length));
    }
  }
}

function say(role, ...children) {
  const article = element('article', {}, ...children);
  article.dataset.role = role;
  $('conversation').append(article);
  article.scrollIntoView({ block: 'end' });
  return article;
}

// A token's own text; where a character needs several tokens, its bytes.
function shown(choice) {
  const text = choice.delta.content;
  if (text) return { text, isEmpty: false };
  return { text: choice.logprobs.content[0].token, isEmpty: true };
}

function tokenNode(choice, number) {
  const { text, isEmpty } = shown(choice);
  const node = element('span', { className: 'token', textContent: text, tabIndex: 0 });
  node.classList.toggle('empty', isEmpty);
  const p = Math.exp(choice.logprobs.content[0].logprob);
  node.style.background = `hsl(${Math.round(120 * p)} 70% 50% / ${(0.45 * (1 - p)).toFixed(3)})`;
  const inspect = () => {
    document.querySelectorAll('.token.chosen').forEach((t) => t.classList.remove('chosen'));
    node.classList.add('chosen');
    showToken(choice, number);
  };
  node.addEventListener('click', inspect);
  node.addEventListener('focus', inspect);
  return node;
}

function row(...cells) {
  return element('tr', {}, ...cells.map((c) => element('td', { textContent: c })));
}

function showToken(choice, number) {
  const [entry] = choice.logprobs.content;
  const percent = (logprob) => `${(100 * Math.exp(logprob)).toFixed(2)} %`;
  const facts = element('table', { id: 'facts' },
    row('token', JSON.stringify(entry.token)),
    row('id', choice.token_ids[0]),
    row('place', number),
    row('log-probability', entry.logprob.toFixed(5)),
    row('probability', percent(entry.logprob)),
    row('powv', choice.powv ?? ''));
  if (choice.proof) {
    facts.append(row('proof', `chunk ${choice.proof.index}, ${choice.proof.data.length} characters`));
    facts.append(row('digest', choice.proof.digest));
  }
  const others = element('table', { id: 'alternatives' });
  for (const other of entry.top_logprobs) {
    others.append(row(JSON.stringify(other.token), other.logprob.toFixed(4), percent(other.logprob)));
  }
  const title = (text) => element('h2', { textContent: text });
  $('token').replaceChildren(title('Token'), facts, title('Most probable'), others);
}

function showChain(end) {
  $('chain').replaceChildren(
    element('h2', { textContent: 'Proof' }),
    element('table', {},
      row('scheme', end.scheme), row('tokens', end.tokens), row('model', end.model),
      row('root', end.root), row('hotkey', end.hotkey ?? 'unsigned')));
}

async function answer() {
  running = new AbortController();
  const options = {
    method: 'POST', headers: headers(), body: JSON.stringify(request()), signal: running.signal,
  };
  const response = await fetch('/v1/chat/completions', options);
  if (!response.ok) throw new Error((await response.json()).error.message);
  const article = say('assistant');
  let [text, count, first] = ['', 0, 0];
  messages.push({ role: 'assistant', content: '' });
  for await (const event of events(response.body)) {
    if (event.error) throw new Error(event.error.message);
    const [choice] = event.choices;
    if (!choice?.logprobs) continue;
    text += choice.delta.content;
    messages.at(-1).content = text;
    count += 1;
    first ||= performance.now();
    article.append(tokenNode(choice, count));
    const seconds = (performance.now() - first) / 1000;
    const rate = seconds > 0 ? ((count - 1) / seconds).toFixed(1) : '-';
    $('speed').value = `${count} tokens, ${rate} tokens/s`;
    if (choice.proof_end) showChain(choice.proof_end);
  }
}

function setRunning(isRunning) {
  $('send').disabled = isRunning;
  $('stop').disabled = !isRunning;
}

$('ask').addEventListener('submit', async (event) => {
  event.preventDefault();
  const text = $('text').value.trim();
  if (!text || $('send').disabled) return;
  $('text').value = '';
  messages.push({ role: 'user', content: text });
  say('user', text);
  setRunning(true);
  try {
    await answer();
  } catch (error) {
    if (error.name !== 'AbortError') say('error', error.message).classList.add('error');
  }
  setRunning(false);
});
$('text').addEventListener('keydown', (event) => {
  if (event.key === 'Enter' && !event.shiftKey) {
    event.preventDefault();
    $('ask').requestSubmit();
  }
});
$('stop').addEventListener('click', () => running?.abort());
$('clear').addEventListener('click', () => {
  running?.abort();
  messages.length = 0;
  $('conversation').replaceChildren();
  $('chain').replaceChildren();
});
$('key').addEventListener('change', () => listModels().catch(() => {}));
listModels().catch((error) => say('error', error.message).classList.add('error'));
