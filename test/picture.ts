// node build.mjs --run test/picture.ts: makes .github/progress.svg, the README's picture, of what a
// terminal of 80 columns (tmux) really shows while the command pulls over a line of 40 ms and 2.5
// MB/s per connection, and at the end.
import { execFileSync } from "node:child_process";
import { once } from "node:events";
import { mkdirSync, symlinkSync, writeFileSync } from "node:fs";
import { type AddressInfo, connect, createServer } from "node:net";
import { join } from "node:path";
import { setTimeout as pause } from "node:timers/promises";
import { makeAuthority } from "./support/certificates.ts";
import { COMMAND_PATH, temporaryFolder } from "./support/command.ts";
import { makeMultiPlatform } from "./support/image.ts";
import { startProxy } from "./support/proxy.ts";
import { startRegistry } from "./support/registry.ts";

const FILE = ".github/progress.svg";
const COLUMNS = 80;
const DELAY_MS = 40;
const BYTES_PER_MS = 2500;
const MEGABYTE = 1_000_000;

/**
 * A line to `port` that delays both ways together by DELAY_MS and lets BYTES_PER_MS of each
 * connection through.
 */
async function startLine(
  target: string,
  end: { after: (cleanUp: () => unknown) => void },
): Promise<string> {
  const [host = "", port = ""] = target.split(":");
  const server = createServer((near) => {
    const far = connect(Number(port), host);
    const waiting: { dueMs: number; bytes: Buffer }[] = [];
    let freeMs = 0;
    const timer = setInterval(() => {
      const now = performance.now();
      while ((waiting[0]?.dueMs ?? Infinity) <= now)
        near.write((waiting.shift() as { bytes: Buffer }).bytes);
      if (far.isPaused() && freeMs - now < DELAY_MS) far.resume();
    }, 4);
    far.on("data", (bytes: Buffer) => {
      freeMs = Math.max(freeMs, performance.now()) + bytes.length / BYTES_PER_MS;
      waiting.push({ dueMs: freeMs + DELAY_MS, bytes });
      if (freeMs - performance.now() > 2 * DELAY_MS) far.pause();
    });
    near.pipe(far);
    near.on("error", () => {}).once("close", () => far.destroy());
    far.on("error", () => {}).once("close", () => clearInterval(timer));
  });
  server.listen(0, "127.0.0.1");
  await once(server, "listening");
  end.after(() => server.close());
  return `127.0.0.1:${(server.address() as AddressInfo).port}`;
}

// ====== The terminal ======

async function capture(scope: { after: (cleanUp: () => unknown) => void }): Promise<string[][]> {
  const authority = makeAuthority();
  const tls = authority.issueServer({ dns: ["registry.corp.example"] });
  const registry = await startRegistry({ tls, auth: "bearer" }, scope);
  const layers = [61, 42, 30, 24, 15].map((size) => size * MEGABYTE);
  registry.add(
    makeMultiPlatform(["linux/amd64", "linux/arm64"], { seed: "web", layers }),
    "team/web",
    "2.4",
  );
  const line = await startLine(registry.host, scope);
  const proxy = await startProxy(scope, { hosts: { "registry.corp.example": line } });
  const home = temporaryFolder(scope);
  mkdirSync(join(home, "bin"));
  symlinkSync(COMMAND_PATH, join(home, "bin/imgpull"));
  symlinkSync(process.execPath, join(home, "bin/node"));
  writeFileSync(join(home, "ca.pem"), authority.cert);
  writeFileSync(join(home, "rc"), "PS1='$ '; unset HISTFILE\n");

  const tmux = (...args: string[]) =>
    execFileSync("tmux", ["-S", join(home, "tmux"), "-f", "/dev/null", ...args], {
      encoding: "utf8",
      env: {
        PATH: `${home}/bin:${process.env.PATH}`,
        HOME: home,
        TERM: "xterm-256color",
        LANG: "C.UTF-8",
        HTTPS_PROXY: proxy.url,
        SSL_CERT_FILE: join(home, "ca.pem"),
      },
    });
  const screen = () => tmux("capture-pane", "-p", "-e", "-t", "picture").trimEnd().split("\n");
  const until = async (pattern: RegExp): Promise<string[]> => {
    for (let attempt = 0; attempt < 1200; attempt += 1) {
      const lines = screen();
      if (pattern.test(lines.join("\n"))) return lines;
      await pause(50);
    }
    throw new Error(`${pattern} never came:\n${screen().join("\n")}`);
  };
  tmux(
    "new-session",
    "-d",
    "-s",
    "picture",
    "-x",
    `${COLUMNS}`,
    "-y",
    "24",
    "-c",
    home,
    "bash --rcfile rc",
  );
  scope.after(() => tmux("kill-server")); // of a socket of its own
  await until(/^\$/);
  tmux("send-keys", "-t", "picture", "imgpull registry.corp.example/team/web:2.4 web.tar", "Enter");
  const during = await until(/^(.*\n)+.*(9\d\.\d|10\d) MB of 172 MB/);
  const after = await until(/imgpull: 1 image.*\n\$/);
  return [during, after.slice(1, -1)];
}

// ====== The picture ======

const [CELL, LEADING, MARGIN] = [8.4, 19, 16];
const escapeXml = (text: string): string => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;");

/** Of the sequences that the display sends, dim is the only one that changes how text looks. */
function renderLine(line: string, state: { isDim: boolean }, y: number): string {
  const spans: string[] = [];
  let column = 0;
  // biome-ignore lint/suspicious/noControlCharactersInRegex: these are the codes that colour a terminal
  for (const [, codes, text = ""] of line.matchAll(/(?:\u001b\[([\d;]*)m)|([^\u001b]+)/g)) {
    if (codes !== undefined) {
      state.isDim = codes === "2" || (state.isDim && !["", "0", "22"].includes(codes));
      continue;
    }
    const bright = text.startsWith("$ ") ? "typed" : "plain";
    const style = state.isDim ? "dim" : bright;
    const [x, width] = [MARGIN + column * CELL, text.length * CELL];
    const size = `x="${x.toFixed(1)}" y="${y}" textLength="${width.toFixed(1)}"`;
    spans.push(`<text class="${style}" ${size} xml:space="preserve">${escapeXml(text)}</text>`);
    column += text.length;
  }
  return spans.join("");
}

function render(screens: string[][]): string {
  const [width, gap] = [2 * MARGIN + COLUMNS * CELL, 14];
  const parts: string[] = [];
  let y = MARGIN + 12;
  for (const [at, lines] of screens.entries()) {
    if (at > 0) {
      const middle = y - LEADING + 6 + gap / 2;
      parts.push(`<path d="M0 ${middle}H${width}" stroke="#30363d"/>`);
      y += gap;
    }
    const state = { isDim: false };
    for (const line of lines) {
      parts.push(renderLine(line, state, y));
      y += LEADING;
    }
  }
  const height = y - LEADING + MARGIN;
  return `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 ${width} ${height}" width="${width}" height="${height}">
<style>
  text { font: 14px ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
  .plain { fill: #e6edf3 } .dim { fill: #9aa4b0 } .typed { fill: #7ee787 }
</style>
<rect x=".5" y=".5" width="${width - 1}" height="${height - 1}" rx="8" fill="#0d1117" stroke="#30363d"/>
${parts.filter(Boolean).join("\n")}
</svg>
`;
}

const cleanUps: (() => unknown)[] = [];
const scope = { after: (cleanUp: () => unknown) => void cleanUps.unshift(cleanUp) };
try {
  const screens = await capture(scope);
  mkdirSync(".github", { recursive: true });
  writeFileSync(FILE, render(screens));
  console.log(screens.map((lines) => lines.join("\n")).join("\n\n"));
} finally {
  for (const cleanUp of cleanUps) await cleanUp();
}
