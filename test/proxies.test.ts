// Section 6, proxies: what they refuse for the moment is asked again, what is theirs is told in
// their name, and what is no proxy of the kind that its URL says is known as such at the first
// connection. tinyproxy, squid and haproxy themselves are in interop-proxies.test.ts.
import assert from "node:assert/strict";
import { once } from "node:events";
import { type AddressInfo, connect, createServer, type Server, type Socket } from "node:net";
import { describe, test } from "node:test";
import { createServer as createTlsServer } from "node:tls";
import { internals } from "../imgpull.ts";
import { makeAuthority } from "./support/certificates.ts";
import type { TestScope } from "./support/command.ts";
import { makeImage } from "./support/image.ts";
import { startProxy as startTestProxy } from "./support/proxy.ts";
import { assertFailed, assertPulled, type PullOptions, tryPull } from "./support/pull.ts";
import { relay, startRawServer } from "./support/raw.ts";
import { startRegistry } from "./support/registry.ts";

const SOON = 400;
const image = makeImage({ seed: "proxies", layers: [8192] });
const tls = makeAuthority().issueServer({ dns: ["registry.test"] });
const REFERENCE = "registry.test/team/app:1.0";

/** The head of an answer, with no body. */
const head = (status: number, ...headers: string[]): string =>
  [`HTTP/1.1 ${status} Not Now`, ...headers, "Content-Length: 0", "", ""].join("\r\n");

/**
 * A proxy that answers its first requests with these heads, and serves those that come after them,
 * or have none.
 */
async function startProxy(t: TestScope, heads: (string | undefined)[]) {
  const secure = await startRegistry({ tls }, t);
  const plain = await startRegistry({}, t);
  for (const registry of [secure, plain]) registry.add(image, "team/app", "1.0");

  return startRawServer(t, async (socket, request) => {
    const refused = heads[request.earlier];
    if (refused !== undefined) {
      socket.end(refused);
      return;
    }
    if (request.method === "CONNECT") {
      socket.removeAllListeners("data");
      const upstream = connect(Number(secure.host.split(":")[1]), "127.0.0.1");
      socket.write("HTTP/1.1 200 OK\r\n\r\n");
      socket.pipe(upstream).pipe(socket);
      upstream.on("error", () => {});
      return;
    }
    const { pathname } = new URL(request.target);
    const answer = await relay(plain.host, { ...request, target: pathname });
    socket.write(`HTTP/1.1 ${answer.status} OK\r\nConnection: close\r\n\r\n`);
    socket.end(answer.body);
  });
}

/** The two ways through a proxy. */
const WAYS: [name: string, options: (proxy: string) => PullOptions][] = [
  ["CONNECT", (proxy) => ({ insecure: true, environment: { HTTPS_PROXY: proxy } })],
  ["plain HTTP", (proxy) => ({ scheme: "http", environment: { HTTP_PROXY: proxy } })],
];

// ====== Refusals ======

describe("what a proxy refuses for the moment is asked again", () => {
  // On plain HTTP, 408, 429 and 503 could be the registry's: squid says that they are its own.
  for (const status of [408, 429, 502, 503, 504]) {
    for (const [way, options] of WAYS) {
      test(`${status} to ${way}, with Retry-After, and in its name`, async (t) => {
        const own = "X-Squid-Error: ERR_CONNECT_FAIL 111";
        const proxy = await startProxy(t, [head(status, own, "Retry-After: 7"), head(status, own)]);
        const outcome = await tryPull(t, REFERENCE, options(`http://${proxy.host}`));
        assertPulled(outcome, image);
        const wait = status === 408 ? internals.LIMITS.firstBackoffMs : 7000;
        assert.deepEqual(outcome.waitsMs, [wait, 2 * internals.LIMITS.firstBackoffMs]);
        assert.match(outcome.warnings[0] ?? "", new RegExp(`^the proxy http://${proxy.host} `));
      });
    }
  }

  for (const [way, options] of WAYS) {
    test(`${way}: until the attempts are used up, or it says to stay away for long`, async (t) => {
      const always = await startProxy(t, Array(9).fill(head(504)));
      const url = `http://${always.host}`;
      const outcome = await tryPull(t, REFERENCE, { ...options(url), retries: 2 });
      assertFailed(outcome, "PROXY", `the proxy ${url} refused`, "504");
      assert.equal(always.requests.length, 3);

      const away = await startProxy(t, Array(9).fill(head(502, "Retry-After: 3600")));
      const ended = await tryPull(t, REFERENCE, options(`http://${away.host}`));
      assertFailed(ended, "PROXY", "502", /come back in 3600 s, at \d{4}-/);
      assert.deepEqual([away.requests.length, ended.waitsMs], [1, []]);
    });

    test(`${way}: what it refuses for good is asked once`, async (t) => {
      for (const status of [400, 403, 405, 501]) {
        const proxy = await startProxy(t, Array(9).fill(head(status, "Server: squid/5.7")));
        const url = `http://${proxy.host}`;
        const outcome = await tryPull(t, REFERENCE, options(url));
        assertFailed(outcome, "PROXY", `the proxy ${url} refused`, `${status}`);
        assert.deepEqual([proxy.requests.length, outcome.waitsMs], [1, []]);
      }
    });
  }
});

describe("on plain HTTP, whose refusal it is", () => {
  const api = "Docker-Distribution-Api-Version: registry/2.0";
  const cases: [name: string, head: string, owner: "proxy" | "registry", words?: string][] = [
    ["a gateway's 502", head(502), "proxy"],
    ["a gateway's 504", head(504), "proxy"],
    ["squid's 503", head(503, "X-Squid-Error: ERR_DNS_FAIL 0"), "proxy"],
    ["tinyproxy's 500", head(500, "Server: tinyproxy/1.11.1"), "proxy"],
    [
      "tinyproxy's 401 for a wrong password",
      head(401, "Server: tinyproxy/1.11.1", 'WWW-Authenticate: Basic realm="Tinyproxy"'),
      "proxy",
      "USER:PASSWORD@HOST",
    ],
    ["407", head(407), "proxy", "USER:PASSWORD@HOST"],
    ["Proxy-Status", head(403, "Proxy-Status: corp; error=http_request_denied"), "proxy"],
    ["a registry's 502", head(502, api), "registry"],
    ["a registry's 503", head(503), "registry"],
    ["a registry's 404", head(404, "Server: nginx"), "registry"],
    ["a registry's 401 in nginx", head(401, "Server: nginx"), "registry"],
  ];
  for (const [name, answer, owner, words] of cases) {
    test(name, async (t) => {
      const proxy = await startProxy(t, Array(9).fill(answer));
      const environment = { HTTP_PROXY: `http://${proxy.host}` };
      const outcome = await tryPull(t, REFERENCE, { scheme: "http", environment, retries: 0 });
      assert(outcome.error);
      assert.equal(outcome.error.code === "PROXY", owner === "proxy", outcome.error.message);
      assert.equal(outcome.error.message.includes("the registry answered"), owner === "registry");
      if (words) assert(outcome.error.message.includes(words), outcome.error.message);
    });
  }
});

// ====== What is no such proxy ======

/** Counts connections to a server that is no HTTP proxy. */
async function startOther(t: TestScope, server: Server) {
  const sockets = new Set<Socket>();
  let connections = 0;
  server.on("connection", (socket: Socket) => {
    connections += 1;
    sockets.add(socket.on("error", () => {}));
  });
  server.listen(0, "127.0.0.1");
  await once(server, "listening");
  t.after(() => {
    server.close();
    for (const socket of sockets) socket.destroy();
  });
  return {
    host: `127.0.0.1:${(server.address() as AddressInfo).port}`,
    count: () => connections,
  };
}

/** As ssh -D and most others: what does not begin with 5 is closed without a word. */
const socks5 = () =>
  createServer((socket) => {
    socket.once("data", (bytes) => socket.end(bytes[0] === 5 ? Buffer.from([5, 0]) : ""));
  });

/** Answers what is no SOCKS in SOCKS all the same. */
const socksWithWords = (answer: number[]) => () =>
  createServer((socket) => socket.once("data", () => socket.end(Buffer.from(answer))));

const tlsAlert = () =>
  createServer((socket) =>
    socket.once("data", () => socket.end(Buffer.from([0x15, 3, 1, 0, 2, 2, 70]))),
  );

const http400 = (body: string) => () =>
  createServer((socket) =>
    socket.once("data", () => socket.end(`HTTP/1.0 400 Bad Request\r\n\r\n${body}`)),
  );

const closes = () => createServer((socket) => socket.once("data", () => socket.destroy()));
const silent = () => createServer((socket) => socket.resume());

describe("what is no proxy of the kind that its URL says: told at once, not asked again", () => {
  const cases: [name: string, scheme: string, make: () => Server, words: string, most: number][] = [
    ["SOCKS 5 that only closes", "http", socks5, "it speaks SOCKS", 3],
    ["SOCKS 5 that answers", "http", socksWithWords([5, 255]), "it speaks SOCKS", 1],
    ["SOCKS 4", "http", socksWithWords([0, 0x5b, 0, 0, 0, 0, 0, 0]), "it speaks SOCKS", 1],
    ["TLS that sends an alert", "http", tlsAlert, "it speaks TLS", 1],
    ["TLS that only closes", "http", () => createTlsServer(tls), "it speaks TLS", 3],
    ["plain HTTP", "https", http400("what?"), "it speaks plain HTTP", 1],
    ["plain HTTP that waits for a line", "https", silent, "no TLS in 0.4 s", 1],
  ];
  for (const [name, scheme, make, words, most] of cases) {
    for (const [way, options] of WAYS) {
      test(`${name} as ${scheme}://, ${way}`, async (t) => {
        const other = await startOther(t, make());
        const proxy = `${scheme}://tester:pw-4711@${other.host}`;
        const outcome = await tryPull(t, REFERENCE, { ...options(proxy), timeoutMs: SOON });
        assertFailed(outcome, "PROXY", words, `${scheme}://${other.host}`);
        assert(!outcome.error?.message.includes("pw-4711"));
        assert.deepEqual([outcome.waitsMs, other.count()], [[], most]);
      });
    }
  }

  for (const words of [
    "Client sent an HTTP request to an HTTPS server.\n",
    "<center>The plain HTTP request was sent to HTTPS port</center>",
  ]) {
    test(`TLS that says so in HTTP: ${words.trim()}`, async (t) => {
      const other = await startOther(t, http400(words)());
      const environment = { HTTPS_PROXY: `http://${other.host}` };
      const outcome = await tryPull(t, REFERENCE, { environment });
      assertFailed(outcome, "PROXY", "it speaks TLS", `https://${other.host}`);
      assert.equal(other.count(), 1);
    });
  }

  test("one that closes, and is no SOCKS, may be back soon", async (t) => {
    for (const [, options] of WAYS) {
      const other = await startOther(t, closes());
      const given = { ...options(`http://${other.host}`), retries: 2 };
      const outcome = await tryPull(t, REFERENCE, given);
      assertFailed(outcome, "NETWORK", `the proxy http://${other.host}`, "connection lost");
      assert.equal(outcome.waitsMs.length, 2);
      assert.equal(other.count(), 5, "three attempts, and once the two questions");
    }
  });

  test("one that has served is no other kind: if it closes, it is asked again", async (t) => {
    const proxy = await startProxy(t, [undefined, ""]);
    const environment = { HTTP_PROXY: `http://${proxy.host}` };
    const outcome = await tryPull(t, REFERENCE, { scheme: "http", environment, concurrency: 1 });
    assertPulled(outcome, image);
    assert.equal(outcome.waitsMs.length, 1);
    assert.equal(proxy.connections, proxy.requests.length, "nothing but requests");
  });
});

// ====== Many at once ======

test("32 connections at once give Node nothing to warn of, whatever the way", async (t) => {
  const many = makeImage({ seed: "many", layers: Array(40).fill(100_000) });
  const warnings: Error[] = [];
  const note = (warning: Error) => warnings.push(warning);
  process.on("warning", note);
  t.after(() => process.off("warning", note));

  for (const scheme of ["http", "https"] as const) {
    const registry = await startRegistry({ auth: "bearer", ...(scheme === "https" && { tls }) }, t);
    const direct = registry.add(many, "team/app", "1.0");
    registry.on({ kind: "layer" }, { redirect: "storage" });
    const { url } = await startTestProxy(t, { hosts: { "registry.test": "127.0.0.1" } });
    const environment = { HTTP_PROXY: url, HTTPS_PROXY: url };
    for (const reference of [direct, direct.replace("127.0.0.1", "registry.test")]) {
      const given = { scheme, environment, insecure: true, concurrency: 32 };
      assertPulled(await tryPull(t, reference, given), many);
    }
  }
  await new Promise(setImmediate);
  assert.deepEqual(warnings, []);
});
