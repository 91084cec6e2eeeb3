// A validator's page at `/` in headless Chromium: validator_page.mjs URL CHROMIUM [SCREENSHOT].
import assert from 'node:assert/strict';
import { chromium } from 'playwright-core';

const [url, executablePath, screenshot] = process.argv.slice(2);
const args = ['--no-sandbox', '--disable-gpu', '--disable-background-networking'];
const browser = await chromium.launch({ executablePath, args });
const page = await browser.newPage({ viewport: { width: 1200, height: 900 } });
const problems = [];
page.on('pageerror', (error) => problems.push(error.message));
page.on('console', (line) => line.type() === 'error' && problems.push(line.text()));
page.on('request', (r) => r.url().startsWith(url) || r.url() === 'data:,' ||
  problems.push(`asked ${r.url()}`));

// A round must have ended.
for (let i = 0; i < 300; i += 1) {
  await page.goto(url);
  if (await page.locator('#miners tr').count() > 1) break;
  await new Promise((done) => setTimeout(done, 400));
}
const squares = page.locator('#miners svg rect');
assert.ok(await squares.count() > 0, 'no verdict is shown');
// The sheet that the policy names is in force.
const fill = await squares.first().evaluate((rect) => getComputedStyle(rect).fill);
assert.notEqual(fill, 'rgb(0, 0, 0)');
const tokens = page.locator('#answer span');
assert.ok(await tokens.count() > 3, 'no answer is shown');
const shown = await tokens.evaluateAll((all) => all.filter((t) => t.title.includes('rank')).length);
assert.ok(shown > 0, 'no token has a rank');
if (screenshot) await page.screenshot({ path: screenshot, fullPage: true });

// A verdict leads to its answer, and back.
await page.locator('#miners svg a').last().dispatchEvent('click');
await page.waitForURL(/answers/);
assert.ok(await page.locator('#answer span').count() > 3);
await page.click('nav a');
await page.waitForSelector('#miners');
assert.deepEqual(problems, []);
await browser.close();
console.log(`validator's page: ${shown} tokens with rank and margin; verdicts lead to answers`);
