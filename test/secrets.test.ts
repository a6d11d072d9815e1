// No secret in any output or file: first where each of them is put to use, then in all that the
// whole suite has seen (build.mjs runs this file last, when the other files have ended). No stack
// trace either: that would be a bug.
import assert from "node:assert/strict";
import { existsSync, readdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { describe, test } from "node:test";
import { inspect } from "node:util";
import { Puller } from "../imgpull.ts";
import { makeAuthority } from "./support/certificates.ts";
import {
  type CommandOptions,
  runCommand,
  SECRETS,
  secretForms,
  seenOutput,
  temporaryFolder,
  USER,
} from "./support/command.ts";
import { makeImage } from "./support/image.ts";
import { startProxy } from "./support/proxy.ts";
import {
  type Fault,
  type Registry,
  type RegistryOptions,
  startRegistry,
} from "./support/registry.ts";

const forms = secretForms();
const image = makeImage({ seed: "secrets", layers: [8192, 2_000_000] });
const authority = makeAuthority();

/** What was found, without the secret itself: this is printed when a test fails. */
function secretsIn(text: string): string[] {
  return forms.flatMap((form, index) => {
    const at = text.indexOf(form);
    return at < 0 ? [] : [`secret ${index} after: ${text.slice(Math.max(0, at - 60), at)}`];
  });
}

const STACK = /^\s+at .*:\d+:\d+\)?$/m;

function filesBelow(folder: string): string[] {
  return readdirSync(folder, { withFileTypes: true, recursive: true })
    .filter((entry) => entry.isFile())
    .map((entry) => join(entry.parentPath, entry.name));
}

test("the search finds every secret, alone, in a sentence, and in Base64 at any place", () => {
  for (const secret of Object.values(SECRETS)) {
    assert.equal(secretsIn(`GET http://h/?X-Amz-Signature=${secret}1: 403`).length, 1);
    for (const before of ["", "a:", "ab:", "tester:"]) {
      assert.equal(
        secretsIn(`Basic ${Buffer.from(`${before}${secret}12`).toString("base64")}`).length,
        1,
        before,
      );
    }
  }
  assert.deepEqual(secretsIn("GET http://127.0.0.1/v2/: 401 tester"), []);
  assert.match("Error: no\n    at run (/dist/imgpull.cjs:10:2)\n", STACK);
});

// ====== Each secret in use ======

interface Scenario {
  name: string;
  secret: keyof typeof SECRETS;
  options?: RegistryOptions;
  prepare?: (registry: Registry) => unknown;
  args?: string[];
  run?: (registry: Registry) => CommandOptions;
  exitCode: number;
}

const password = ["--user", USER, "--password", SECRETS.password];
const signed: Pick<Scenario, "secret" | "options"> = {
  secret: "signature",
  options: { auth: "none" },
};
/** Layers are redirected to signed URLs of storage, which has this fault. */
const toStorage = (registry: Registry, fault?: Fault) => {
  registry.on({ kind: "layer" }, { redirect: "storage" });
  if (fault) registry.on({ kind: "storage" }, fault);
};
const stored =
  (entry: object) =>
  (registry: Registry): CommandOptions => ({
    env: { DOCKER_AUTH_CONFIG: JSON.stringify({ auths: { [registry.host]: entry } }) },
  });
const identity = stored({ identitytoken: SECRETS.identityToken });
const byFile = stored({ auth: Buffer.from(`${USER}:${SECRETS.password}`).toString("base64") });

const SCENARIOS: Scenario[] = [
  {
    name: "a password that is right",
    secret: "password",
    options: { auth: "basic" },
    args: password,
    exitCode: 0,
  },
  {
    name: "a password that is wrong",
    secret: "password",
    args: password,
    exitCode: 1,
    options: { auth: { mode: "basic", password: "other" } },
  },
  {
    name: "a password from stdin",
    secret: "password",
    options: { auth: "bearer" },
    exitCode: 0,
    args: ["--user", USER, "--password-stdin"],
    run: () => ({ stdin: `${SECRETS.password}\n` }),
  },
  {
    name: "a stored password that is refused",
    secret: "password",
    run: byFile,
    exitCode: 0,
    options: { auth: { mode: "bearer", password: "other" } },
  },
  {
    name: "a token service that is down",
    secret: "password",
    args: password,
    exitCode: 1,
    options: { auth: "bearer" },
    prepare: (registry) => registry.on({ kind: "token" }, { status: 503 }),
  },
  {
    name: "an outside token",
    secret: "outsideToken",
    args: ["--token", SECRETS.outsideToken],
    exitCode: 0,
    options: { auth: { mode: "basic", outsideToken: SECRETS.outsideToken } },
  },
  {
    name: "an outside token that is refused",
    secret: "outsideToken",
    options: { auth: "bearer" },
    args: ["--token", SECRETS.outsideToken],
    exitCode: 1,
  },
  {
    name: "an identity token",
    secret: "identityToken",
    options: { auth: "bearer" },
    run: identity,
    exitCode: 0,
  },
  {
    name: "an identity token that is refused",
    secret: "identityToken",
    run: identity,
    exitCode: 1,
    options: { auth: { mode: "bearer", anonymous: "refused", identityToken: "other" } },
  },
  {
    name: "a bearer token and a download that breaks off",
    secret: "bearerToken",
    exitCode: 1,
    options: { auth: "bearer" },
    prepare: (registry) => registry.on({ kind: "layer" }, { dropAfter: 1_500_000 }),
  },
  {
    name: "a bearer token that goes stale",
    secret: "bearerToken",
    exitCode: 1,
    options: { auth: "bearer" },
    prepare: (registry) => registry.on({ kind: "layer" }, { status: 401 }),
  },
  { name: "signed URLs", ...signed, prepare: toStorage, exitCode: 0 },
  ...[403, 404, 429, 500].map(
    (status): Scenario => ({
      name: `signed URLs that give ${status}`,
      ...signed,
      exitCode: 1,
      prepare: (registry) => toStorage(registry, { status }),
    }),
  ),
  {
    name: "a signed URL that breaks off",
    ...signed,
    exitCode: 1,
    prepare: (registry) => toStorage(registry, { dropAfter: 100 }),
  },
  {
    name: "a signed URL that is silent",
    ...signed,
    args: ["--timeout", "1"],
    exitCode: 1,
    prepare: (registry) => toStorage(registry, { stallAfter: 100 }),
  },
  {
    name: "a signed URL with corrupt bytes",
    ...signed,
    exitCode: 1,
    prepare: (registry) => toStorage(registry, { corruptAt: 5 }),
  },
  {
    name: "a signed URL that redirects for ever",
    ...signed,
    exitCode: 1,
    prepare: (registry) => toStorage(registry, { redirect: "storage" }),
  },
  {
    name: "a signed URL with an unknown authority",
    secret: "signature",
    exitCode: 1,
    prepare: toStorage,
    options: { storage: { tls: authority.issueServer() } },
  },
  {
    name: "a signed URL of no known kind",
    secret: "signature",
    exitCode: 1,
    prepare: (registry) =>
      registry.on({ kind: "layer" }, { redirect: `gopher://h/?sig=${SECRETS.signature}0` }),
  },
];

describe("no secret in stdout, stderr or any file", () => {
  for (const { name, secret, options = {}, prepare, args = [], run, exitCode } of SCENARIOS) {
    test(name, async (t) => {
      const registry = await startRegistry(options, t);
      prepare?.(registry);
      const folder = temporaryFolder(t);
      const reference = registry.add(image, "team/app", "1.0");
      const words = [
        reference,
        join(folder, "image.tar"),
        "--scheme",
        "http",
        "--retries",
        "0",
        ...args,
      ];
      const result = await runCommand(words, run?.(registry));
      assert.equal(result.exitCode, exitCode, result.stderr);
      const seen = [
        result.stdout.toString("latin1"),
        result.stderr,
        ...filesBelow(folder).flatMap((file) => [file, readFileSync(file, "latin1")]),
      ];
      assert.deepEqual(seen.flatMap(secretsIn), []);
      assert.doesNotMatch(result.stderr, STACK);
      // It was really used, or told.
      const exchanged = registry.requests.map(
        ({ url, headers, body, kind, status }) =>
          `${url} ${JSON.stringify(headers)} ${body} ${kind === "layer" && status === 307 ? SECRETS.signature : ""}`,
      );
      const mine = secretForms()
        .slice(4 * Object.keys(SECRETS).indexOf(secret))
        .slice(0, 4);
      assert(
        mine.some((form) => exchanged.join("\n").includes(form)),
        "the secret was not used",
      );
    });
  }

  const proxies = [
    ["a proxy in absolute form", false, {}],
    ["a proxy with CONNECT", true, {}],
    ["a proxy in absolute form that fails", false, { fault: 502 }],
    ["a proxy with CONNECT that fails", true, { fault: 403 }],
    ["a proxy that hangs up", true, { fault: "close" }],
  ] as const;
  for (const [name, withTls, options] of proxies) {
    test(name, async (t) => {
      const tls = authority.issueServer({ dns: ["registry.test"] });
      const registry = await startRegistry(withTls ? { tls } : {}, t);
      registry.add(image, "team/app", "1.0");
      const proxy = await startProxy(t, {
        hosts: { "registry.test": "127.0.0.1" },
        credentials: true,
        ...options,
      });
      const folder = temporaryFolder(t);
      writeFileSync(join(folder, "ca.pem"), authority.cert);
      const reference = registry
        .add(image, "team/app", "1.0")
        .replace("127.0.0.1", "registry.test");
      const result = await runCommand(
        [
          reference,
          join(folder, "image.tar"),
          "--scheme",
          withTls ? "https" : "http",
          "--retries",
          "0",
        ],
        { env: { ALL_PROXY: proxy.urlWithCredentials, SSL_CERT_FILE: join(folder, "ca.pem") } },
      );
      assert.equal(result.exitCode, "fault" in options ? 1 : 0, result.stderr);
      assert(proxy.requests.length > 0 && proxy.requests.every(({ status }) => status !== 407));
      const seen = [
        result.stdout.toString("latin1"),
        result.stderr,
        ...filesBelow(folder).flatMap((file) => [file, readFileSync(file, "latin1")]),
        // Neither does the registry get to know what is the proxy's.
        ...registry.requests.map(({ headers, url }) => `${url} ${JSON.stringify(headers)}`),
      ];
      assert.deepEqual(seen.flatMap(secretsIn), []);
      assert.doesNotMatch(result.stderr, STACK);
    });
  }
});

const TYPED: [name: string, args: string[], exitCode: number][] = [
  ["--parsed", ["alpine:3", "--parsed", ...password], 0],
  ["--parsed with a token", ["alpine:3", "--parsed", "--token", SECRETS.outsideToken], 0],
  [
    "--parsed with every short form",
    ["alpine:3", "--parsed", "-u", USER, `-p${SECRETS.password}`],
    0,
  ],
  ["an option twice", ["alpine:3", ...password, "--password", SECRETS.password], 2],
  ["an option misspelt", ["alpine:3", `--pasword=${SECRETS.password}`], 2],
  ["a password without a user", ["alpine:3", `--password=${SECRETS.password}`], 2],
  ["a token beside a user", ["alpine:3", ...password, "--token", SECRETS.outsideToken], 2],
  ["a token that no header can carry", ["alpine:3", "--token", `${SECRETS.outsideToken}\n`], 2],
  ["a password beside --password-stdin", ["alpine:3", ...password, "--password-stdin"], 2],
  ["a URL for a reference", [`https://${USER}:${SECRETS.password}@registry.test/alpine:3`], 2],
  ["several hosts", ["a.test/alpine:3", "b.test/alpine:3", "./x.tar", ...password], 2],
];

test("no secret in what is said of the command line", async (t) => {
  const cwd = temporaryFolder(t);
  for (const [name, args, exitCode] of TYPED) {
    const result = await runCommand(args, { cwd });
    assert.equal(result.exitCode, exitCode, `${name}: ${result.stderr}`);
    assert.deepEqual(secretsIn(`${result.stdout} ${result.stderr}`), [], name);
  }
  assert(!existsSync(join(cwd, "alpine-3.tar")));
});

test("a password with an @ in what was meant as a reference is not repeated", async () => {
  const { exitCode, stderr } = await runCommand([
    `https://me:hun@${SECRETS.password}@host/app:1`,
    "a.tar",
  ]);
  assert.equal(exitCode, 2);
  for (const form of secretForms()) assert.ok(!stderr.includes(form));
});

test("no secret in a Puller that somebody logs", () => {
  const puller = new Puller({
    url: "registry.test/app",
    username: USER,
    password: SECRETS.password,
  });
  assert.deepEqual(
    secretsIn(`${inspect(puller, { depth: 9, showHidden: true })} ${JSON.stringify(puller)}`),
    [],
  );
});

// ====== All output of the suite ======

test("no secret, no mark and no stack trace in all that the suite has seen", () => {
  const seen = seenOutput();
  assert(seen.size > 0, "nothing was kept");
  // build.mjs says so when all test files have run before this one: then the search is not of this
  // file's output only.
  if (process.env.IMGPULL_SUITE === "whole")
    assert(seen.size > 5, `output of ${seen.size} test files only`);
  // What stands around a server's words within our sentences, until they leave (read as Latin-1).
  const marks = ["\u2068", "\u2069"].map((mark) => Buffer.from(mark).toString("latin1"));
  const found = [...seen].flatMap(([file, text]) => {
    for (const mark of marks)
      assert(!text.includes(mark), `${file}: a mark was left in a sentence`);
    const stack = STACK.exec(text);
    const lines = secretsIn(text).map((secret) => `${file}: ${secret}`);
    if (stack)
      lines.push(
        `${file}: a stack: ${text.slice(Math.max(0, stack.index - 300), stack.index + 200)}`,
      );
    return lines;
  });
  assert.deepEqual(found, []);
});
