// Section 6, deadlines: how long a connection, headers and bodies are waited for, whatever trickles
// in meanwhile; which waits grow; what is dropped instead of read. Bounds are counted in requests
// and connections, not by the clock.
import assert from "node:assert/strict";
import { type ChildProcess, spawn } from "node:child_process";
import { subscribe, unsubscribe } from "node:diagnostics_channel";
import dns from "node:dns";
import { once } from "node:events";
import { connect, type Socket } from "node:net";
import { describe, type TestContext, test } from "node:test";
import { internals } from "../imgpull.ts";
import { type Identity, makeAuthority } from "./support/certificates.ts";
import { makeImage } from "./support/image.ts";
import { startProxy } from "./support/proxy.ts";
import { assertFailed, assertPulled, makeSlow, tryPull } from "./support/pull.ts";
import {
  headLines,
  type RawRequest,
  type RawServer,
  relay,
  startRawServer,
} from "./support/raw.ts";
import { startRegistry } from "./support/registry.ts";

const HTTP = { scheme: "http" } as const;
const SOON = 700;
// Too short to be cut: one request an attempt.
const image = makeImage({ seed: "deadlines", layers: [8192, 250_000] });

/**
 * Writes a little now and then, for as long as the other side listens: Node's own time-outs never
 * fire.
 */
function trickle(socket: Socket, first: string, repeated = "x"): void {
  socket.write(first);
  const timer = setInterval(() => socket.write(repeated), 20);
  socket.once("close", () => clearInterval(timer));
}

/** A registry behind a server that does to the requests which `isHit` what the test says. */
async function behind(
  t: TestContext,
  isHit: (request: RawRequest) => boolean,
  hit: (socket: Socket, request: RawRequest, server: RawServer) => void,
  options: { auth?: "bearer"; tls?: Identity } = {},
) {
  const registry = await startRegistry({}, t);
  registry.add(image, "team/app", "1.0");
  const hits: RawRequest[] = [];
  const answer = async (socket: Socket, request: RawRequest, self: RawServer) => {
    if (isHit(request)) {
      hits.push(request);
      hit(socket, request, self);
      return;
    }
    if (options.auth && !/^authorization/im.test(request.head)) {
      const challenge = `WWW-Authenticate: Bearer realm="http://${self.host}/token"`;
      socket.write(`HTTP/1.1 401 No\r\n${challenge}\r\nContent-Length: 0\r\n\r\n`);
      return;
    }
    const relayed = await relay(registry.host, request);
    const lines = [`HTTP/1.1 ${relayed.status} OK`, ...headLines(relayed)];
    socket.write(`${lines.join("\r\n")}\r\nContent-Length: ${relayed.body.length}\r\n\r\n`);
    socket.write(relayed.body);
  };
  const { tls } = options;
  const server = await startRawServer(t, answer, tls ? { tls } : {});
  return { registry, server, hits, reference: `${server.host}/team/app:1.0` };
}

const isManifest = ({ target }: RawRequest) => target.includes("/manifests/");
const isToken = ({ target }: RawRequest) => target.startsWith("/token");
const isConfig = ({ target }: RawRequest) => target.includes(image.config.digest);
const isLayer = ({ target }: RawRequest) => target.includes(image.layers[1]?.digest ?? "?");
const HEAD = "HTTP/1.1 200 OK\r\n";

describe("what trickles without end is a fault like silence", { concurrency: 8 }, () => {
  const trickles: [
    name: string,
    isHit: (request: RawRequest) => boolean,
    hit: (socket: Socket) => void,
    auth?: "bearer",
  ][] = [
    ["headers of a manifest", isManifest, (socket) => trickle(socket, `${HEAD}x: `)],
    [
      "early hints before a manifest",
      isManifest,
      (socket) => trickle(socket, "", "HTTP/1.1 103 Early Hints\r\n\r\n"),
    ],
    ["a manifest", isManifest, (socket) => trickle(socket, `${HEAD}\r\n`, " ")],
    ["a token", isToken, (socket) => trickle(socket, `${HEAD}\r\n`, " "), "bearer"],
    ["headers of a layer", isLayer, (socket) => trickle(socket, `${HEAD}x: `)],
    ["a layer", isLayer, (socket) => trickle(socket, `${HEAD}Content-Length: 250000\r\n\r\n`)],
  ];
  for (const [name, isHit, hit, auth] of trickles) {
    test(name, async (t) => {
      const { hits, reference } = await behind(t, isHit, hit, auth ? { auth } : {});
      const outcome = await tryPull(t, reference, { ...HTTP, timeoutMs: SOON, retries: 1 });
      assertFailed(outcome, "TIMEOUT");
      // On a busy machine one attempt may end before it comes that far.
      assert(hits.length === 1 || hits.length === 2, `${hits.length} requests`);
    });
  }

  test("the body of an error: its status is told all the same", async (t) => {
    const refusal = "HTTP/1.1 404 Not Found\r\n\r\n";
    const { hits, reference } = await behind(t, isManifest, (socket) => trickle(socket, refusal));
    assertFailed(await tryPull(t, reference, { ...HTTP, timeoutMs: SOON }), "NOT_FOUND", "404");
    assert.equal(hits.length, 1);
  });

  test("a TLS handshake, and the tunnel to one", async (t) => {
    const server = await startRawServer(t, () => {}, {
      onConnection: (socket) => trickle(socket, "\x16\x03\x03\x40\x00", "\x00"),
    });
    const direct = await tryPull(t, `${server.host}/app:1`, { timeoutMs: SOON, retries: 1 });
    assertFailed(direct, "TIMEOUT", "nothing came");
    assert.equal(server.connections, 2);

    const proxy = await startRawServer(t, (socket) => trickle(socket, `${HEAD}x: `));
    const environment = { HTTPS_PROXY: `http://${proxy.host}` };
    const given = { environment, timeoutMs: SOON, retries: 1 };
    assertFailed(await tryPull(t, "registry.test/app:1", given), "TIMEOUT", proxy.host);
    assert.equal(proxy.connections, 2);
  });

  for (const tls of [undefined, makeAuthority().issueServer()]) {
    // Longer, so that it is the layer that is slow, and not a machine that has much to do.
    const timeoutMs = 3 * SOON;
    test(`a layer that moves, however slowly, is none${tls ? ", over TLS too" : ""}`, async (t) => {
      const options = tls ? { tls } : {};
      const { hits, registry, reference } = await behind(
        t,
        isLayer,
        async (socket, request) => {
          const { body } = await relay(registry.host, request);
          socket.write(`${HEAD}Content-Length: ${body.length}\r\n\r\n`);
          for (let at = 0; at < body.length; at += 60_000) {
            socket.write(body.subarray(at, at + 60_000));
            await new Promise((done) => setTimeout(done, timeoutMs / 2));
          }
        },
        options,
      );
      const given = tls ? { insecure: true } : HTTP;
      const outcome = await tryPull(t, reference, { ...given, timeoutMs });
      assertPulled(outcome, image);
      assert.deepEqual([hits.length, outcome.waitsMs], [1, []]);
    });
  }
});

// ====== A process that was stopped ======
// By Ctrl-Z, by a laptop that slept, by a machine that has too much to do: what came in time has
// not been read yet when the deadline is over.

/** Nothing of ours runs meanwhile, and the first thing after that are the timers. */
function stopProcess(milliseconds: number, before = () => {}): void {
  setImmediate(() => {
    before();
    Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, milliseconds);
  });
}

describe("what came while we were stopped is not late", () => {
  const begin = async (socket: Socket, request: RawRequest, host: string) => {
    const { body } = await relay(host, request);
    socket.write(`${HEAD}Content-Length: ${body.length}\r\n\r\n`);
    return body;
  };
  type Answer = (socket: Socket, request: RawRequest, host: string) => Promise<unknown>;
  const cases: [name: string, isHit: (request: RawRequest) => boolean, answer: Answer][] = [
    [
      "headers",
      isManifest,
      async (socket, request, host) => {
        const { body } = await relay(host, request);
        const head = `${HEAD}Content-Length: ${body.length}\r\n\r\n`;
        stopProcess(2 * SOON, () => socket.write(head + body));
      },
    ],
    [
      "the rest of a layer",
      isLayer,
      async (socket, request, host) => {
        const body = await begin(socket, request, host);
        socket.write(body.subarray(0, 100_000));
        await new Promise((done) => setTimeout(done, SOON / 4));
        stopProcess(3 * SOON, () => socket.write(body.subarray(100_000)));
      },
    ],
    [
      "the rest of a document",
      isConfig,
      async (socket, request, host) => {
        const body = await begin(socket, request, host);
        socket.write(body.subarray(0, 10));
        await new Promise((done) => setTimeout(done, SOON / 4));
        stopProcess(5 * SOON, () => socket.write(body.subarray(10)));
      },
    ],
  ];
  for (const [name, isHit, answer] of cases) {
    test(name, async (t) => {
      const { hits, registry, reference } = await behind(t, isHit, (socket, request) =>
        answer(socket, request, registry.host),
      );
      const outcome = await tryPull(t, reference, { ...HTTP, timeoutMs: SOON });
      assertPulled(outcome, image);
      assert.deepEqual([hits.length, outcome.waitsMs], [1, []]);
    });
  }

  test("a range", async (t) => {
    const large = makeImage({ seed: "range", layers: [8_000_000, 9000] });
    const registry = await startRegistry({}, t);
    const reference = registry.add(large, "team/app", "1.0");
    const digest = large.layers[0]?.digest ?? "";
    makeSlow(registry, digest);
    let wasStopped = false;
    const answer = async (_request: unknown, _response: unknown, next: () => Promise<void>) => {
      const sending = next();
      stopProcess(4 * SOON, () => {
        wasStopped = true;
      });
      await sending;
    };
    registry.on({ digest, ranged: true, times: 1 }, { handler: answer });

    let isFirstRound = true;
    const { takeAbandoned } = internals.Schedule.prototype;
    type Schedule = InstanceType<typeof internals.Schedule>;
    const firstRound = function (this: Schedule, nowMs: number) {
      const abandoned = takeAbandoned.call(this, nowMs);
      if (wasStopped && isFirstRound) {
        isFirstRound = false;
        assert.equal(abandoned.length, 0, "given up");
      }
      return abandoned;
    };
    t.mock.method(internals.Schedule.prototype, "takeAbandoned", firstRound);
    assertPulled(await tryPull(t, reference, { ...HTTP, concurrency: 2 }), large);
    assert.equal(isFirstRound, false);
  });

  test("a connection", async (t) => {
    const registry = await startRegistry({}, t);
    registry.add(image, "team/app", "1.0");
    let connects = 0;
    const onConnecting = () => {
      connects += 1;
      if (connects === 1) stopProcess(2 * SOON);
    };
    subscribe("net.client.socket", onConnecting);
    t.after(() => unsubscribe("net.client.socket", onConnecting));
    const given = { ...HTTP, timeoutMs: SOON, concurrency: 1 };
    const outcome = await tryPull(t, `${registry.host}/team/app:1.0`, given);
    assertPulled(outcome, image);
    assert.deepEqual([connects, outcome.waitsMs], [1, []]);
  });
});

describe("the wait for headers grows with each attempt", { concurrency: 4 }, () => {
  const places = [
    ["a manifest", isManifest],
    ["a config", isConfig],
    ["a layer", isLayer],
  ] as const;
  for (const [name, isHit] of places) {
    test(`${name} that a cache fetches before it answers: thrice the time-out`, async (t) => {
      const { hits, registry, reference } = await behind(t, isHit, (socket, request) => {
        setTimeout(async () => {
          const { body } = await relay(registry.host, request);
          socket.write(`${HEAD}Content-Length: ${body.length}\r\n\r\n`);
          socket.write(body);
        }, 3 * SOON);
      });
      const outcome = await tryPull(t, reference, { ...HTTP, timeoutMs: SOON, retries: 2 });
      assertPulled(outcome, image);
      assert.equal(hits.length, 3);
    });
  }

  test("up to four times, and no further", async (t) => {
    const { hits, reference } = await behind(t, isManifest, () => {});
    const outcome = await tryPull(t, reference, { ...HTTP, timeoutMs: 50, retries: 4 });
    assertFailed(outcome, "TIMEOUT", "nothing came for 0.2 s");
    assert.equal(hits.length, 5);
    const told = outcome.warnings.map((line) => /came for ([\d.]+) s/.exec(line)?.[1]);
    assert.deepEqual(told, ["0.05", "0.1", "0.2", "0.2"]);
  });
});

test("of a redirect's body nothing is read but a little", async (t) => {
  const MEGABYTE = Buffer.alloc(1024 * 1024);
  let writtenBytes = 0;
  const { hits, registry, reference } = await behind(t, isLayer, (socket, { target }) => {
    const pour = () => {
      if (socket.destroyed || writtenBytes > 1024 * MEGABYTE.length) return;
      writtenBytes += MEGABYTE.length;
      socket.write(MEGABYTE, pour);
    };
    socket.write(`HTTP/1.1 307 Go\r\nLocation: http://${registry.host}${target}\r\n\r\n`, pour);
  });
  assertPulled(await tryPull(t, reference, HTTP), image);
  assert.equal(hits.length, 1);
  assert(writtenBytes < 32 * MEGABYTE.length, `${writtenBytes} bytes were taken`);
});

test("after a redirect with a short body the connection is kept", async (t) => {
  const { server, hits, registry, reference } = await behind(
    t,
    ({ target }) => target.includes("/blobs/"),
    (socket, { target }) => {
      const lines = ["HTTP/1.1 307 Go", `Location: http://${registry.host}${target}`];
      socket.write(`${lines.join("\r\n")}\r\nContent-Length: 4\r\n\r\ngone`);
    },
  );
  assertPulled(await tryPull(t, reference, { ...HTTP, concurrency: 1 }), image);
  assert.equal(hits.length, image.blobs.size);
  assert.equal(server.connections, 1);
});

// ====== Several addresses ======

/**
 * A server whose queue of new connections is full: what comes now is taken a second later, by TCP's
 * own repetition.
 */
async function startSlowToAccept(t: TestContext, onwards: string) {
  const port = Number(onwards.split(":")[1]);
  const script = `
    const server = require("node:net").createServer((socket) => {
      const onward = require("node:net").connect(${port}, "127.0.0.1");
      socket.pipe(onward).pipe(socket);
      for (const each of [socket, onward]) each.on("error", () => {});
    });
    server.listen({ port: 0, host: "127.0.0.1", backlog: 1 }, () => console.log(server.address().port));`;
  const child: ChildProcess = spawn(process.execPath, ["-e", script], {
    stdio: ["ignore", "pipe", "inherit"],
  });
  t.after(() => child.kill("SIGKILL"));
  assert(child.stdout);
  const [line] = await once(child.stdout, "data");
  const slowPort = Number(String(line));

  child.kill("SIGSTOP");
  const fillers = Array.from({ length: 4 }, () => connect(slowPort, "127.0.0.1"));
  for (const filler of fillers) filler.on("error", () => {});
  t.after(() => {
    for (const filler of fillers) filler.destroy();
  });
  await new Promise((done) => setTimeout(done, 100));
  return { port: slowPort, resume: () => child.kill("SIGCONT") };
}

describe("each of a host's addresses is given seconds", () => {
  /** `slow.test` has an address that takes its time, and one where nobody listens. */
  function resolveSlowly(t: TestContext): void {
    const real = dns.lookup;
    type Callback = (error: Error | null, addresses: { address: string; family: number }[]) => void;
    t.mock.method(dns, "lookup", (name: string, options: dns.LookupAllOptions, done: Callback) => {
      if (name !== "slow.test") return real(name, options, done as never);
      const addresses = ["127.0.0.1", "127.0.0.2"].map((address) => ({ address, family: 4 }));
      process.nextTick(done, null, addresses);
    });
  }

  for (const way of ["the registry's", "a proxy's"]) {
    test(way, async (t) => {
      const registry = await startRegistry({}, t);
      registry.add(image, "team/app", "1.0");
      const proxy = await startProxy(t, { hosts: { "r.test": registry.host } });
      const direct = way.startsWith("the");
      const slow = await startSlowToAccept(t, (direct ? registry : proxy).host);
      resolveSlowly(t);
      setTimeout(slow.resume, 600);
      const reference = direct ? `slow.test:${slow.port}/team/app:1.0` : "r.test/team/app:1.0";
      const environment = direct ? {} : { HTTP_PROXY: `http://slow.test:${slow.port}` };
      const outcome = await tryPull(t, reference, { ...HTTP, environment, retries: 0 });
      assertPulled(outcome, image);
    });
  }
});

// ====== Names ======

describe("a name that no server tells", () => {
  const cases: [code: string, words: RegExp, attempts: number][] = [
    ["EAI_AGAIN", /no name server answers\n {2}is this machine connected/, 3],
    ["ENOTFOUND", /no such host/, 1],
  ];
  for (const [code, words, attempts] of cases) {
    test(code, async (t) => {
      let asked = 0;
      type Callback = (error: Error) => void;
      t.mock.method(dns, "lookup", (name: string, _options: object, done: Callback) => {
        asked += 1;
        const error = Object.assign(new Error(`getaddrinfo ${code} ${name}`), { code });
        process.nextTick(done, error);
      });
      const outcome = await tryPull(t, "nobody.test/app:1", { ...HTTP, retries: 2 });
      assertFailed(outcome, "NETWORK", words);
      assert.equal(asked, attempts);
    });
  }
});
