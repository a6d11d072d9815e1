// What peers put on the wire, section 6: answers that Node's strict parser refuses and other
// clients take, at the registry's, the token service's and the proxy's; and what nobody should
// take, in clear words and without retries.
import assert from "node:assert/strict";
import { connect } from "node:net";
import { describe, test } from "node:test";
import { internals } from "../imgpull.ts";
import { makeAuthority } from "./support/certificates.ts";
import { SECRETS, type TestScope, USER } from "./support/command.ts";
import { makeImage } from "./support/image.ts";
import { assertFailed, assertPulled, tryPull } from "./support/pull.ts";
import { headLines, type RelayedAnswer, relay, startRawServer } from "./support/raw.ts";
import { type RegistryOptions, startRegistry } from "./support/registry.ts";

const HTTP = { scheme: "http" } as const;
const GIVEN = { username: USER, password: SECRETS.password };
const image = makeImage({ seed: "wire", layers: [8192, 8192] });

/** An answer as bytes, from what the test registry answered. */
type Writing = (answer: RelayedAnswer) => (string | Buffer)[];

const length = ({ body }: RelayedAnswer): string => `content-length: ${body.length}`;
const lines = (answer: RelayedAnswer, ...more: string[]): string =>
  [`HTTP/1.1 ${answer.status} As It Is`, ...headLines(answer), ...more, "", ""].join("\r\n");

const ODD: [name: string, write: Writing][] = [
  [
    "a length beside chunks",
    (answer) => [
      lines(answer, length(answer), "transfer-encoding: chunked"),
      answer.body.length ? `${answer.body.length.toString(16)}\r\n` : "",
      answer.body,
      answer.body.length ? "\r\n0\r\n\r\n" : "0\r\n\r\n",
    ],
  ],
  [
    "LF alone ends the lines",
    (answer) => [lines(answer, length(answer)).replaceAll("\r\n", "\n"), answer.body],
  ],
  [
    "folded lines",
    (answer) => [lines(answer, "x-folded: one,\r\n two", length(answer)), answer.body],
  ],
  [
    "a blank before the colon of the length",
    (answer) => [lines(answer, length(answer).replace(":", " :")), answer.body],
  ],
  [
    "no reason after the status",
    (answer) => [lines(answer, length(answer)).replace(" As It Is", ""), answer.body],
  ],
  [
    "a control character in a value",
    (answer) => [lines(answer, "x-odd: a\u0001b", length(answer)), answer.body],
  ],
  [
    "a header of 21 KB, as Google's registry has sent",
    (answer) => [lines(answer, `x-large: ${"x".repeat(21_000)}`, length(answer)), answer.body],
  ],
  [
    "headers of just under 1 MiB",
    (answer) => [
      lines(answer, `x-large: ${"x".repeat(internals.LIMITS.headerBytes - 2000)}`, length(answer)),
      answer.body,
    ],
  ],
  [
    "5,000 headers before those that count",
    (answer) => {
      const [status, ...rest] = lines(answer, length(answer)).split("\r\n");
      return [[status, ...Array(5000).fill("x-many: x"), ...rest].join("\r\n"), answer.body];
    },
  ],
];

async function odd(t: TestScope, write: Writing, options: RegistryOptions = {}) {
  const registry = await startRegistry(options, t);
  registry.add(image, "team/app", "1.0");
  const server = await startRawServer(t, async (socket, request) => {
    for (const piece of write(await relay(registry.host, request))) socket.write(piece);
  });
  return { registry, server, reference: `${server.host}/team/app:1.0` };
}

describe("answers that other clients take", () => {
  for (const [name, write] of ODD) {
    test(`${name}: challenge, manifest, config and layers`, async (t) => {
      const { server, reference } = await odd(t, write, { auth: "basic" });
      const outcome = await tryPull(t, reference, { ...HTTP, ...GIVEN });
      assertPulled(outcome, image);
      assert.deepEqual(outcome.waitsMs, []);
      assert.equal(server.requests.length, 2 + image.blobs.size, "one challenge, then each once");
    });
  }
});

describe("answers that nobody should take: one request, clear words", () => {
  const refused: [name: string, write: Writing, words: RegExp][] = [
    [
      "two Content-Lengths",
      (answer) => [lines(answer, length(answer), length(answer)), answer.body],
      /length twice/,
    ],
    [
      "a list of Content-Lengths",
      (answer) => [lines(answer, `${length(answer)}, ${answer.body.length}`), answer.body],
      /length twice/,
    ],
    [
      "headers of more than 1 MiB",
      (answer) => [
        lines(answer, `x-large: ${"x".repeat(internals.LIMITS.headerBytes)}`, length(answer)),
        answer.body,
      ],
      /headers are larger than 1048576/,
    ],
    [
      "a header without a colon",
      (answer) => [lines(answer, "neither name nor value", length(answer)), answer.body],
      /header line of the answer is malformed/,
    ],
    ["not HTTP at all", () => ["SSH-2.0-OpenSSH_9.2p1\r\n"], /does not speak HTTP/],
    [
      "HTTP/2 in the clear",
      (answer) => [`HTTP/2 ${answer.status}\r\n\r\n`],
      /not speak HTTP\/1\.1/,
    ],
  ];
  for (const [name, write, words] of refused) {
    test(name, async (t) => {
      const { server, reference } = await odd(t, write);
      const outcome = await tryPull(t, reference, HTTP);
      assertFailed(outcome, "PROTOCOL", words, "manifests/1.0");
      assert.deepEqual(outcome.waitsMs, []);
      assert.equal(server.connections, 1);
    });
  }
});

test("bytes left over on a kept connection cost no attempt", async (t) => {
  const registry = await startRegistry({}, t);
  registry.add(image, "team/app", "1.0");
  const server = await startRawServer(t, async (socket, request) => {
    const answer = await relay(registry.host, request);
    socket.write(lines(answer, length(answer)));
    socket.write(answer.body);
    if (request.target.includes("/manifests/")) socket.write("left over");
  });
  const outcome = await tryPull(t, `${server.host}/team/app:1.0`, { ...HTTP, concurrency: 1 });
  assertPulled(outcome, image);
  assert.deepEqual(outcome.waitsMs, []);
});

describe("a proxy's answer to CONNECT", () => {
  const authority = makeAuthority();
  const tls = authority.issueServer({ dns: ["registry.test"] });
  const answers: [name: string, head: string][] = [
    ["LF alone", "HTTP/1.1 200 OK\nvia: odd\n\n"],
    ["folded", "HTTP/1.1 200 OK\r\nvia: odd,\r\n more\r\n\r\n"],
    ["a blank before the colon", "HTTP/1.1 200 OK\r\ncontent-length : 0\r\n\r\n"],
    ["a length, which there is none to", "HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"],
    ["200 KB of headers", `HTTP/1.1 200 OK\r\nx: ${"x".repeat(200_000)}\r\n\r\n`],
    ["201", "HTTP/1.1 201 Created\r\n\r\n"],
    ["HTTP/1.0", "HTTP/1.0 200 Connection established\r\n\r\n"],
  ];
  for (const [name, head] of answers) {
    test(name, async (t) => {
      const registry = await startRegistry({ tls }, t);
      registry.add(image, "team/app", "1.0");
      const port = Number(registry.host.split(":")[1]);
      const proxy = await startRawServer(t, (socket) => {
        socket.removeAllListeners("data");
        const upstream = connect(port, "127.0.0.1", () => socket.write(head));
        socket.pipe(upstream).on("error", () => {});
        upstream.pipe(socket);
      });
      const outcome = await tryPull(t, `registry.test:${port}/team/app:1.0`, {
        insecure: true,
        environment: { HTTPS_PROXY: `http://${proxy.host}` },
      });
      assertPulled(outcome, image);
      assert.deepEqual(outcome.waitsMs, []);
    });
  }
});
