// The page at `/` in headless Chromium: page.mjs URL CHROMIUM [SCREENSHOT].
import assert from 'node:assert/strict';
import { chromium } from 'playwright-core';

const [url, executablePath, screenshot] = process.argv.slice(2);
const args = ['--no-sandbox', '--disable-gpu', '--disable-background-networking'];
const browser = await chromium.launch({ executablePath, args });
const page = await browser.newPage({ viewport: { width: 1200, height: 800 } });
const problems = [];
page.on('pageerror', (error) => problems.push(error.message));
page.on('console', (line) => line.type() === 'error' && problems.push(line.text()));
page.on('request', (r) => r.url().startsWith(url) || problems.push(`asked ${r.url()}`));

await page.goto(url);
await page.waitForSelector('#model option', { state: 'attached' });
await page.fill('#temperature', '0');
await page.fill('#max_tokens', '24');
await page.selectOption('#proof', 'residue-v1-u4');
await page.fill('#text', 'What is the capital of France?');
await page.press('#text', 'Enter');
await page.waitForFunction(() => document.querySelectorAll('.token').length > 3);
await page.waitForFunction(() => !document.querySelector('#send').disabled);
const answer = await page.textContent('article[data-role=assistant]');
assert.match(answer, /Paris/);

const tokens = await page.locator('.token').count();
await page.locator('.token').nth(1).click();
const facts = await page.textContent('#facts');
for (const fact of ['log-probability', 'powv', 'place2']) {
  assert.ok(facts.includes(fact), `${fact} is not in ${facts}`);
}
assert.equal(await page.locator('#alternatives tr').count(), 5);
assert.match(await page.textContent('#chain'), new RegExp(`residue-v1-u4.*tokens${tokens}`));
assert.match(await page.inputValue('#speed').catch(() => page.textContent('#speed')),
  new RegExp(`${tokens} tokens, [0-9.]+ tokens/s`));
if (screenshot) await page.screenshot({ path: screenshot });

// A long answer stops when told to, and an error is shown in words.
await page.fill('#max_tokens', '400');
await page.fill('#text', 'Count from one to one thousand.');
await page.click('#send');
await page.waitForFunction((n) => document.querySelectorAll('.token').length > n + 3, tokens);
await page.click('#stop');
await page.waitForFunction(() => !document.querySelector('#send').disabled);
assert.deepEqual(problems, []);
await page.fill('#temperature', '-1');
await page.fill('#text', 'x');
await page.click('#send');
await page.waitForSelector('article.error');
assert.match(await page.textContent('article.error'), /temperature/);
await browser.close();
console.log(`page: ${tokens} tokens with facts, alternatives and proof; stop; error in words`);
