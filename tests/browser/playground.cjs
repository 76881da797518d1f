// Drives the playground in Chromium, through a proxy that can ask for a key, tamper with answers and break
// connections. Optional, and no part of pytest; it needs Node, Chromium and `npm install playwright-core`:
//   CHROMIUM=$(command -v chromium) NODE_PATH=node_modules node tests/browser/playground.cjs URL FOLDER
// URL is a running server of the bundled checkpoint; screenshots go to FOLDER.
"use strict";
const assert = require("node:assert/strict");
const fs = require("node:fs");
const http = require("node:http");
const path = require("node:path");
const { chromium } = require("playwright-core");

const [url, folder] = process.argv.slice(2);
const KEY = "sesame";
const MARKUP = '<img src=x onerror="document.title=1">';
const FLAGS = ["--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
  "--disable-component-update", "--disable-sync"];

// What the proxy does to the next requests.
const mischief = { wantsKey: false, tamper: null, isDown: false };
const sockets = new Set();
const proxy = http.createServer((request, response) => {
  if (mischief.wantsKey && request.url !== "/" && request.headers.authorization !== `Bearer ${KEY}`) {
    response.writeHead(401, { "Content-Type": "application/json" });
    response.end(JSON.stringify({ error: { message: "a key is missing or wrong" } }));
    return;
  }
  const chunks = [];
  request.on("data", (chunk) => chunks.push(chunk));
  request.on("end", () => forward(request, Buffer.concat(chunks), response));
});
proxy.on("connection", (socket) => {
  if (mischief.isDown) socket.destroy();
  sockets.add(socket);
  socket.on("close", () => sockets.delete(socket));
});

function forward({ method, url: target, headers }, body, response) {
  const isSpeculative = /"draft_length":[1-9]/.test(body);
  const onward = http.request(url + target, { method, headers }, (answer) => {
    response.writeHead(answer.statusCode, answer.headers);
    answer.on("data", (data) => {
      response.write(isSpeculative && mischief.tamper ? mischief.tamper(data.toString()) : data);
    });
    answer.on("end", () => response.end());
    answer.on("error", () => response.destroy());
  });
  onward.on("error", () => response.destroy());
  response.on("close", () => onward.destroy());
  onward.end(body);
}

function goDown() {
  mischief.isDown = true;
  for (const socket of sockets) socket.destroy();
}

const shoot = (page, name) => page.screenshot({ path: path.join(folder, `${name}.png`), fullPage: true });
const said = (page, part) => page.waitForFunction(
  (text) => document.getElementById("verdict").textContent.includes(text), part, { timeout: 60000 });
const drafts = (page, kind) => page.locator(`#speculative pre .${kind}`).count();
const textOf = (page, side) => page.locator(`#${side} pre`).evaluate((pre) => {
  const copy = pre.cloneNode(true);
  for (const refused of copy.querySelectorAll(".refused")) refused.remove();
  return copy.textContent;
});
const ready = (page) => page.waitForSelector("#choices:enabled");

async function answersSideBySide(page) {
  await ready(page);
  await page.focus("#exit-layer");
  const before = await page.textContent("#exit-layer-shown");
  await page.keyboard.press("ArrowRight");
  assert.notEqual(await page.textContent("#exit-layer-shown"), before);
  await page.fill("#prompt", "class Stack:\n    def push(self, item):\n");
  await page.focus("#prompt");
  await page.keyboard.press("Control+Enter");
  await page.waitForSelector("#speculative pre .kept");
  await shoot(page, "desktop-midway");
  await said(page, "same text");
  assert.ok((await drafts(page, "kept")) > 0 && (await drafts(page, "refused")) > 0);
  assert.ok((await textOf(page, "plain")).length > 100);
  assert.equal(await textOf(page, "plain"), await textOf(page, "speculative"));
  assert.ok(await page.isHidden("#alarm"));
  assert.match(await page.textContent("#speed-up"), /\d\.\d\d×/);
  await page.waitForTimeout(1000);
  await shoot(page, "desktop");
  await page.uncheck("#show-refused");
  assert.ok(await page.locator("#speculative pre .refused").first().isHidden());
  await page.check("#show-refused");
}

async function samplesBothAtOnce(page) {
  await page.locator("#temperature").fill("0.8");
  await page.fill("#seed", "5");
  await page.check("#at-once");
  await page.click("#generate");
  await said(page, "with seed 5");
  assert.equal(await textOf(page, "plain"), await textOf(page, "speculative"));
  await shoot(page, "sampled-at-once");
  await page.uncheck("#at-once");
  await page.locator("#temperature").fill("0");
}

async function stops(page) {
  await page.fill("#max-tokens", "400");
  await page.focus("#generate");
  await page.keyboard.press("Enter");
  await page.waitForFunction(() => document.querySelector("#plain pre").textContent.length > 40);
  assert.equal(await page.evaluate(() => document.activeElement.id), "stop");
  await page.keyboard.press("Escape");
  await said(page, "Stopped");
  assert.ok((await textOf(page, "speculative")) === "");
  assert.equal(await page.evaluate(() => document.activeElement.id), "generate");
  await shoot(page, "stopped");
}

async function refusesWithTheReason(page) {
  await page.fill("#prompt", "x = 1\n".repeat(700));
  await page.click("#generate");
  await page.waitForSelector("#plain .failure:visible");
  assert.match(await page.textContent("#plain .failure"), /400/);
  await shoot(page, "refused");
  await page.fill("#prompt", "def f(");
}

async function breaks(page) {
  await page.fill("#max-tokens", "400");
  await page.click("#generate");
  await page.waitForFunction(() => document.querySelector("#plain pre").textContent.length > 40);
  goDown();
  await page.waitForSelector("#plain .failure:visible");
  assert.match(await page.textContent("#plain .failure"), /connection broke/);
  await page.waitForFunction(() => document.getElementById("server").textContent.includes("Trying again"));
  await shoot(page, "broken");
  mischief.isDown = false;
  await page.waitForFunction(() => document.getElementById("server").className === "muted");
}

async function raisesTheAlarm(page) {
  await page.fill("#max-tokens", "48");
  mischief.tamper = (data) => data.replace(/("text":"[^"]*?)return/, "$1ruturn");
  await page.fill("#prompt", "class Stack:\n    def push(self, item):\n");
  await page.click("#generate");
  await page.waitForSelector("#alarm:visible");
  await shoot(page, "alarm");
  mischief.tamper = (data) => data.replace(/"text":"(?:[^"\\]|\\.)*"/g, `"text":${JSON.stringify(MARKUP)}`)
    .replace(/"drafted_tokens":\["(?:[^"\\]|\\.)*"/g, `"drafted_tokens":[${JSON.stringify(MARKUP)}`);
  await page.click("#generate");
  await page.waitForSelector("#alarm:visible");
  assert.ok((await page.textContent("#speculative pre")).includes(MARKUP));
  assert.equal(await page.locator("#speculative img").count(), 0);
  assert.equal(await page.title(), "LayerSkip playground");
  mischief.tamper = null;
}

async function wantsKey(page) {
  mischief.wantsKey = true;
  await page.reload();
  await page.waitForFunction(() => document.activeElement.id === "key");
  await shoot(page, "key");
  await page.keyboard.type(KEY);
  await page.keyboard.press("Enter");
  await ready(page);
  assert.deepEqual(await page.evaluate(() => [localStorage.length, document.cookie]), [0, ""]);
  await page.fill("#max-tokens", "24");
  await page.click("#generate");
  await said(page, "same text");
  mischief.wantsKey = false;
}

async function fits(page, name) {
  await ready(page);
  await page.fill("#prompt", "class Stack:\n    def push(self, item):\n");
  await page.fill("#max-tokens", "64");
  await page.click("#generate");
  await said(page, "same text");
  await page.waitForTimeout(1000);
  assert.ok(await page.evaluate(() => document.documentElement.scrollWidth <= innerWidth), "scrolls sideways");
  await shoot(page, name);
}

async function main() {
  fs.mkdirSync(folder, { recursive: true });
  await new Promise((resolve) => proxy.listen(0, "127.0.0.1", resolve));
  const address = `http://127.0.0.1:${proxy.address().port}/`;
  const browser = await chromium.launch({ executablePath: process.env.CHROMIUM, args: FLAGS, chromiumSandbox: false });
  const complaints = [];
  const open = async (options) => {
    const page = await (await browser.newContext(options)).newPage();
    page.on("pageerror", (error) => complaints.push(error.message));
    page.on("console", (message) => /Security|Refused/.test(message.text()) && complaints.push(message.text()));
    await page.goto(address);
    return page;
  };
  try {
    const page = await open({ viewport: { width: 1280, height: 800 } });
    const steps = [answersSideBySide, samplesBothAtOnce, stops, refusesWithTheReason, breaks, raisesTheAlarm, wantsKey];
    for (const step of steps) {
      await step(page);
      console.log("ok", step.name);
    }
    await fits(await open({ viewport: { width: 390, height: 844 }, deviceScaleFactor: 2, isMobile: true }), "phone");
    await fits(await open({ viewport: { width: 1280, height: 800 }, colorScheme: "dark" }), "dark");
    assert.deepEqual(complaints, []);
    console.log("ok phone and dark; nothing complained");
  } finally {
    await browser.close();
    proxy.close();
    proxy.closeAllConnections();
  }
}

main();
