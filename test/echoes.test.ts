// Section 3, secrets: whatever a registry, token service, storage host, proxy or helper says back
// of what it was shown, in whatever form, none of it is seen. Each case also shows that words came
// through, since silence proves nothing.
import assert from "node:assert/strict";
import childProcess from "node:child_process";
import { chmodSync, writeFileSync } from "node:fs";
import type { IncomingHttpHeaders, IncomingMessage } from "node:http";
import { join } from "node:path";
import { describe, test } from "node:test";
import { inspect } from "node:util";
import { internals } from "../imgpull.ts";
import { makeAuthority } from "./support/certificates.ts";
import {
  runCommand,
  SECRETS,
  secretForms,
  type TestScope,
  temporaryFolder,
  USER,
} from "./support/command.ts";
import { MEDIA, makeImage } from "./support/image.ts";
import { assertFailed, type Outcome, type PullOptions, tryPull } from "./support/pull.ts";
import { startRawServer } from "./support/raw.ts";
import {
  type AuthOptions,
  type Fault,
  type Matcher,
  type Registry,
  startRegistry,
} from "./support/registry.ts";

const HTTP = { scheme: "http", retries: 0 } as const;
const GIVEN = { username: USER, password: SECRETS.password };
const image = makeImage({ seed: "echoes", layers: [8192] });

/** All that a caller could log. */
const everything = ({ error, warnings }: Outcome): string =>
  [error?.message, inspect(error, { depth: 20 }), ...warnings].join("\n");

function assertClean(text: string): void {
  for (const [index, form] of [...secretForms(), ...Object.values(SECRETS).map(percent)].entries())
    assert(!text.includes(form), `secret form ${index} is in: ${text.slice(0, 80)}…`);
}

const percent = (text: string): string =>
  text.replace(/[^A-Za-z0-9]/g, (sign) => `%${sign.charCodeAt(0).toString(16)}`);

// ====== The forms ======

test("each secret is struck out in each form, alone and within other text", () => {
  const secrets = [SECRETS.password, "p&ss w<rd/+%\"'~", "päßwörd-ÿ", "a\\b{c}(d)[e]^$.*?", "🔑🔑"];
  for (const secret of secrets) {
    const struck = new internals.Secrets();
    struck.add(secret);
    const encoded = encodeURIComponent(secret);
    const forms = [
      secret,
      encoded,
      encoded.replace(/%../g, (digits) => digits.toLowerCase()),
      encoded.replaceAll("%20", "+"),
      JSON.stringify(secret).slice(1, -1),
      ...["base64", "base64url"].map((form) =>
        Buffer.from(secret)
          .toString(form as BufferEncoding)
          .replace(/=+$/, ""),
      ),
    ];
    for (const form of forms) {
      const text = struck.strikeWords(`before ${form} after`);
      assert(!text.includes(form), `${form} in ${text}`);
      assert.match(text, /^before .*\*\*\*.* after$/);
    }

    for (let before = 0; before < 6; before += 1) {
      for (let after = 0; after < 6; after += 1) {
        const whole = Buffer.from(`${"x".repeat(before)}${secret}${"y".repeat(after)}`);
        const text = struck.strikeWords(whole.toString("base64"));
        const left = Buffer.from(text.replace("***", ""), "base64").toString("latin1");
        assert(text.includes("***"), `${before} before, ${after} after: ${text}`);
        assert(!left.includes(secret), left);
      }
    }
  }
});

test("short ones only where the words are from outside, very short ones nowhere", () => {
  const struck = new internals.Secrets();
  struck.add("abc", "test1", "correct horse", undefined, "");
  assert.equal(struck.strikeWords("abc test1 correct horse"), "abc *** ***");
  assert.equal(struck.strike("abc test1 correct horse"), "abc test1 ***");
});

test("queries of URLs in words from outside go, whatever they are", () => {
  const struck = new internals.Secrets();
  for (const [words, wanted] of [
    [
      "GET https://h/p?X-Amz-Signature=ab12&x=y failed",
      "GET https://h/p?X-Amz-Signature=***&x=*** failed",
    ],
    ["<a href='/b;sig=ab%2f12'>", "<a href='/b;sig=***'>"],
    ["what? a = b", "what? a = b"],
  ] as const)
    assert.equal(struck.strikeWords(words), wanted);
});

// ====== Who says it ======

type Echo = (shown: string) => string;
const ECHOES: [name: string, echo: Echo][] = [
  ["as it is", (shown) => `no: ${shown}`],
  ["in percent", (shown) => `no: ${percent(shown)}`],
  ["as URL", (shown) => `no: /auth?header=${encodeURIComponent(shown)}`],
  ["decoded", (shown) => `no: ${Buffer.from(shown.split(" ")[1] ?? shown, "base64")} ${shown}`],
  [
    "in Base64 again",
    (shown) => `no: ${Buffer.from(`Authorization: ${shown}`).toString("base64")}`,
  ],
];

/** A whole answer that says what it was shown. */
const answerWith = (status: number, body: (headers: IncomingHttpHeaders) => string): Fault => ({
  handler: ({ headers }, response) => {
    response.writeHead(status, { "content-type": "text/plain" }).end(body(headers));
  },
});

const errorsOf = (words: string) =>
  JSON.stringify({ errors: [{ code: "DENIED", message: words }] });

interface Case {
  name: string;
  auth: AuthOptions["mode"];
  matcher: Matcher;
  fault: (echo: Echo, registry: Registry) => Fault;
  options: (host: string) => PullOptions;
}

const identity = (host: string): PullOptions => ({
  environment: {
    DOCKER_AUTH_CONFIG: JSON.stringify({
      auths: { [host]: { identitytoken: SECRETS.identityToken } },
    }),
  },
});

const CASES: Case[] = [
  ...[403, 500].map(
    (status): Case => ({
      name: `a registry's ${status} with the password`,
      auth: "basic",
      matcher: { kind: "manifest" },
      fault: (echo) =>
        answerWith(status, ({ authorization = "" }) => errorsOf(echo(authorization))),
      options: () => GIVEN,
    }),
  ),
  {
    name: "a registry's plain text with the token",
    auth: "bearer",
    matcher: { kind: "config" },
    fault: (echo) => answerWith(500, ({ authorization = "" }) => echo(authorization)),
    options: () => GIVEN,
  },
  {
    name: "an outside token",
    auth: "basic",
    matcher: { kind: "manifest", beforeAuth: true },
    fault: (echo) => answerWith(403, ({ authorization = "" }) => errorsOf(echo(authorization))),
    options: () => ({ token: SECRETS.outsideToken }),
  },
  {
    name: "a token service with the password",
    auth: "bearer",
    matcher: { kind: "token" },
    fault: (echo) =>
      answerWith(401, ({ authorization = "" }) => JSON.stringify({ details: echo(authorization) })),
    options: () => GIVEN,
  },
  {
    name: "a token service with an identity token",
    auth: "bearer",
    matcher: { kind: "token", method: "POST" },
    fault: (echo, registry) =>
      answerWith(500, () => {
        const { body = "" } = registry.requests.at(-1) ?? {};
        return JSON.stringify({ error: "invalid", error_description: echo(body) });
      }),
    options: identity,
  },
];

describe("what is said back is struck out", () => {
  for (const { name, auth, matcher, fault, options } of CASES) {
    test(name, async (t) => {
      for (const [form, echo] of ECHOES) {
        const registry = await startRegistry({ auth }, t);
        const reference = registry.add(image, "team/app", "1.0");
        const rule = registry.on(matcher, fault(echo, registry));
        const outcome = await tryPull(t, reference, { ...HTTP, ...options(registry.host) });
        assert(outcome.error, form);
        assert(rule.hits > 0, form);
        assertClean(everything(outcome));
        assert.match(outcome.error.message, /no: .*\*\*\*/, form);
      }
    });
  }

  const url = ({ url: asked = "" }: IncomingMessage) => asked;
  const storage: [name: string, words: (asked: string) => string][] = [
    ["the signed URL", (asked) => `Expired: http://storage${asked}`],
    [
      "the signature alone",
      (asked) => `no match for ${new URL(asked, "http://h").searchParams.get("X-Amz-Signature")}`,
    ],
    [
      "S3's XML",
      (asked) =>
        `<?xml version="1.0"?><Error><Code>AccessDenied</Code><Message>at ${asked.replaceAll("&", "&amp;")}</Message></Error>`,
    ],
  ];
  for (const [name, words] of storage) {
    test(`a storage host's: ${name}`, async (t) => {
      const registry = await startRegistry({}, t);
      const reference = registry.add(image, "team/app", "1.0");
      registry.on({ kind: "layer" }, { redirect: "storage" });
      registry.on(
        { kind: "storage" },
        {
          handler: (request, response) => {
            response.writeHead(403).end(words(url(request)));
          },
        },
      );
      const outcome = await tryPull(t, reference, HTTP);
      assert(outcome.error);
      assertClean(everything(outcome));
      assert.match(outcome.error.message, /\(.*\*\*\*.*\)/);
    });
  }

  test("a Content-Type, however long", async (t) => {
    const registry = await startRegistry({ auth: "basic" }, t);
    const reference = registry.add(image, "team/app", "1.0");
    for (const padding of [0, 30, 60, 75]) {
      registry.on(
        { kind: "manifest", times: 1 },
        {
          handler: ({ headers }, response) => {
            const type = `text/${"x".repeat(padding)}${headers.authorization?.replace(" ", "-")}`;
            response.writeHead(200, { "content-type": type }).end("a web page");
          },
        },
      );
      const outcome = await tryPull(t, reference, { ...HTTP, ...GIVEN });
      assertFailed(outcome, "PROTOCOL", "this is not a manifest but text/");
      assertClean(everything(outcome));
    }
  });

  test("a proxy's reason, to CONNECT and on plain HTTP", async (t) => {
    for (const echo of ECHOES.slice(0, 2).map(([, each]) => each)) {
      const proxy = await startRawServer(t, (socket, { head }) => {
        const [, shown = ""] = /^proxy-authorization: (.*)$/im.exec(head) ?? [];
        socket.end(`HTTP/1.1 407 ${echo(shown.trim())}\r\nContent-Length: 0\r\n\r\n`);
      });
      const address = `http://${USER}:${SECRETS.proxyPassword}@${proxy.host}`;
      const environment = { HTTP_PROXY: address, HTTPS_PROXY: address };
      for (const scheme of ["http", "https"] as const) {
        const outcome = await tryPull(t, "registry.test/app:1", { ...HTTP, scheme, environment });
        assertFailed(outcome, "PROXY", /407 no: .*\*\*\*/);
        assertClean(everything(outcome));
      }
    }
  });

  test("a signature in the path of a redirect", async (t) => {
    for (const path of [
      `/blob;sig=${SECRETS.signature}1`,
      `/blob%3Bsig=${SECRETS.signature}1/x`,
      `/blob%3fsig=${SECRETS.signature}1`,
    ]) {
      const registry = await startRegistry({}, t);
      const reference = registry.add(image, "team/app", "1.0");
      registry.on({ kind: "layer" }, { redirect: path });
      const outcome = await tryPull(t, reference, HTTP);
      assert(outcome.error);
      assertClean(everything(outcome));
      assert.match(outcome.error.message, /\/blob(;|%3B|%3f)\*\*\*/);
    }
  });
});

// ====== Short ones ======

/** An answer in place of what a request asks for. */
type Said = readonly [matcher: Matcher, fault: (secret: string, registry: Registry) => Fault];

const manifestOf = (json: object, mediaType: string = MEDIA.ociManifest): Fault => ({
  status: 200,
  headers: { "content-type": mediaType },
  body: JSON.stringify({ schemaVersion: 2, mediaType, ...json }),
});
const entryOf = (digest: string, platform: object) => ({
  ...{ mediaType: MEDIA.ociManifest, digest, size: 100, platform },
});
const indexOf = (...entries: object[]) => manifestOf({ manifests: entries }, MEDIA.ociIndex);
const hexOf = (secret: string) => `sha256:${Buffer.from(secret).toString("hex").padEnd(64, "0")}`;
const elsewhere = (location: string): Fault => ({ status: 307, headers: { location } });

const MANIFEST: Matcher = { kind: "manifest" };
const LAYER: Matcher = { kind: "layer" };
const SAID: Record<string, Said> = {
  "the path of a redirect": [
    LAYER,
    (secret, { url }) => elsewhere(`${url}/gone/${secret}/blob`), //
  ],
  "the same, in percent": [LAYER, (secret) => elsewhere(`/gone/${percent(secret)}/blob`)],
  "the host of a redirect": [LAYER, (secret) => elsewhere(`http://${secret}.invalid/blob`)],
  "the scheme of a redirect": [LAYER, (secret) => elsewhere(`${secret}://h/blob`)],
  "the ?ns= of a redirect": [LAYER, (secret) => elsewhere(`/gone?ns=${secret}`)],
  "a redirect to itself": [LAYER, (secret) => elsewhere(`/v2/app/blobs/${secret}`)],
  "a manifest's mediaType": [MANIFEST, (secret) => manifestOf({}, `application/${secret}`)],
  "a Content-Type": [
    MANIFEST,
    (secret) => ({ status: 200, headers: { "content-type": `text/${secret}` }, body: "a page" }),
  ],
  "a Content-Type that is cut": [
    MANIFEST,
    (secret) => ({
      ...{ status: 200, body: "a page" },
      headers: { "content-type": `text/${"x".repeat(70)}${secret}` },
    }),
  ],
  "a digest that is none": [MANIFEST, (secret) => indexOf(entryOf(secret, {}))],
  "a size that is none": [
    MANIFEST,
    (secret) => indexOf({ ...entryOf(hexOf("a"), {}), size: secret }),
  ],
  "a platform's operating system": [
    MANIFEST,
    (secret) => indexOf(...["a", "b"].map((of) => entryOf(hexOf(of), platformOf(secret)))),
  ],
  "a Content-Range": [
    LAYER,
    (secret) => ({
      status: 206,
      headers: { "content-range": `bytes ${secret}` },
      body: "x".repeat(8192),
    }),
  ],
};
const platformOf = (secret: string) => ({ os: secret, architecture: `${secret}-amd64` });

async function pullWith(
  t: TestScope,
  password: string,
  prepare: (registry: Registry) => void,
): Promise<Outcome> {
  const registry = await startRegistry({ auth: { mode: "basic", password } }, t);
  const reference = registry.add(image, "team/app", "1.0");
  prepare(registry);
  return tryPull(t, reference, { ...HTTP, username: USER, password });
}

describe("a short password, wherever a registry says it", () => {
  for (const [name, [matcher, fault]] of Object.entries(SAID)) {
    test(name, async (t) => {
      for (const secret of ["hunter2", "wq7x", "ab1234"]) {
        const outcome = await pullWith(t, secret, (registry) =>
          registry.on(matcher, fault(secret, registry)),
        );
        const said = everything(outcome);
        assert(outcome.error, secret);
        assert(!said.includes(secret), said);
        assert(!said.includes(percent(secret)), said);
      }
    });
  }

  test("a digest's digits", async (t) => {
    const secret = "c0ffee";
    const outcome = await pullWith(t, secret, (registry) => {
      const digest = `sha256:${secret.padEnd(64, "0")}`;
      registry.on({ ...MANIFEST, tag: "1.0" }, indexOf(entryOf(digest, image.platform)));
    });
    assertFailed(outcome, "NOT_FOUND", "no such manifest: sha256:***0000");
    assert(!everything(outcome).includes(secret));
  });

  test("the platform of a lone image", async (t) => {
    const secret = "hunter2";
    const registry = await startRegistry({ auth: { mode: "basic", password: secret } }, t);
    const other = makeImage({ seed: "other", platform: `linux/amd64/${secret}` });
    const reference = registry.add(other, "team/app", "1.0");
    const options = { ...HTTP, username: USER, password: secret, archType: "arm64" };
    const outcome = await tryPull(t, reference, options);
    assertFailed(outcome, "NO_PLATFORM", "it is one image, for linux/amd64/***");
    assert(!everything(outcome).includes(secret));
  });

  test("a token service's realm", async (t) => {
    const secret = "hunter2";
    const options = { username: USER, password: secret };
    for (const realm of [`http://10.1.2.3/${secret}`, `/${secret}/token`, `ftp://h/${secret}`]) {
      const registry = await startRegistry({ auth: { mode: "bearer", realm } }, t);
      const reference = registry.add(image, "team/app", "1.0");
      const outcome = await tryPull(t, reference, { ...HTTP, ...options });
      assert(outcome.error);
      assert.match(outcome.error.message, /\*\*\*/);
      assert(!everything(outcome).includes(secret));
    }
  });

  test("the next page of a list of referrers, and a foreign layer's place", async (t) => {
    const secret = "hunter2";
    const layer = { urls: [`https://127.0.0.1:1/${secret}`] };
    const foreign = makeImage({ seed: "foreign", layers: [layer] });
    const registry = await startRegistry({ auth: { mode: "basic", password: secret } }, t);
    const reference = registry.add(foreign, "team/app", "1.0", {
      without: foreign.layers.map(({ digest }) => digest),
    });
    const next = `</v2/team/app/referrers/${secret}>; rel="next"`;
    registry.on(
      { path: /referrers\/sha/ },
      { status: 200, headers: { link: next }, body: JSON.stringify({ manifests: [] }) },
    );
    registry.on({ path: new RegExp(secret) }, { status: 500 });
    const options = { ...HTTP, username: USER, password: secret };
    for (const referrers of [true, false]) {
      const outcome = await tryPull(t, reference, { ...options, referrers });
      assert(outcome.error);
      assert(!everything(outcome).includes(secret), everything(outcome));
    }
  });

  test("where a proxy is to lead to, and a redirect that it refuses", async (t) => {
    const secret = "hunter2";
    const proxy = await startRawServer(t, (socket) => {
      socket.end("HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n");
    });
    for (const scheme of ["http", "https"]) {
      const registry = await startRegistry({ auth: { mode: "basic", password: secret } }, t);
      const reference = registry.add(image, "team/app", "1.0");
      registry.on(LAYER, elsewhere(`${scheme}://${secret}.test/blob`));
      const address = `http://${proxy.host}`;
      const environment = { HTTP_PROXY: address, HTTPS_PROXY: address };
      const options = { ...HTTP, username: USER, password: secret, environment };
      const outcome = await tryPull(t, reference, options);
      assert.match(outcome.error?.message ?? "", /\*\*\*\.test/);
      assert(!everything(outcome).includes(secret), everything(outcome));
    }
  });

  test("the names in a certificate", async (t) => {
    const secret = "hunter2";
    const authority = makeAuthority();
    const caCert = join(temporaryFolder(t), "ca.pem");
    writeFileSync(caCert, authority.cert);
    const storage = { tls: authority.issueServer({ dns: [`${secret}.test`], ip: [] }) };
    const registry = await startRegistry(
      { auth: { mode: "basic", password: secret }, tls: authority.issueServer(), storage },
      t,
    );
    const reference = registry.add(image, "team/app", "1.0");
    registry.on(LAYER, { redirect: "storage" });
    const options = { caCert, username: USER, password: secret, retries: 0 };
    const outcome = await tryPull(t, reference, options);
    assertFailed(outcome, "TLS", /not for 127\.0\.0\.1 but for \*\*\*\.test/);
  });

  test("a mirror's: what is warned of it", async (t) => {
    const secret = "hunter2";
    const mirror = await startRegistry({ auth: { mode: "basic", password: secret } }, t);
    mirror.add(image, "team/app", "1.0");
    mirror.on(LAYER, elsewhere(`/gone/${secret}/blob`));
    mirror.on({ path: /gone/ }, { status: 500 });
    const registry = await startRegistry({}, t);
    const reference = registry.add(image, "team/app", "1.0");
    const auth = Buffer.from(`${USER}:${secret}`).toString("base64");
    const DOCKER_AUTH_CONFIG = JSON.stringify({ auths: { [mirror.host]: { auth } } });
    const outcome = await tryPull(t, reference, {
      ...HTTP,
      mirrors: { [registry.host]: [mirror.host] },
      environment: { DOCKER_AUTH_CONFIG },
    });
    assert.equal(outcome.error, undefined);
    assert.match(outcome.warnings.join(), /\/gone\/\*\*\*\/blob/);
    assert(!everything(outcome).includes(secret));
  });
});

test("words of our own stay whole, whatever the password", async (t) => {
  for (const secret of ["http", "error", "team", "answer", "127."]) {
    const outcome = await pullWith(t, secret, (registry) =>
      registry.on(MANIFEST, { status: 500, body: `error: ${secret}` }),
    );
    const { message = "" } = outcome.error ?? {};
    assert.match(message, /^http:\/\/127[\d.:]+\/v2\/team\/app\/manifests\/1\.0: the /);
    assert.match(message, /registry answered 500 \((error|\*\*\*): \*\*\*\)$/);
  }
});

// ====== Helpers ======

test("a helper that fails: nothing of its stdout is shown", async (t) => {
  const folder = temporaryFolder(t);
  const helper = join(folder, "docker-credential-leaky");
  const answer = JSON.stringify({ Username: USER, Secret: SECRETS.password });
  writeFileSync(helper, `#!/bin/sh\necho '${answer}'\necho "the vault is sealed" >&2\nexit 1\n`);
  chmodSync(helper, 0o755);
  const environment = {
    PATH: `${folder}:${process.env.PATH}`,
    DOCKER_AUTH_CONFIG: JSON.stringify({ credsStore: "leaky" }),
  };
  const registry = await startRegistry({ auth: "basic" }, t);
  const reference = registry.add(image, "team/app", "1.0");
  const outcome = await tryPull(t, reference, { ...HTTP, environment });
  assertFailed(outcome, "CREDENTIALS", "docker-credential-leaky failed: the vault is sealed");
  assertClean(everything(outcome));
});

test("a helper that ignores SIGTERM does not hold us", async (t) => {
  const folder = temporaryFolder(t);
  const helper = join(folder, "docker-credential-deaf");
  writeFileSync(helper, "#!/bin/sh\ntrap '' TERM\nexec sleep 30\n");
  chmodSync(helper, 0o755);
  const { execFile } = childProcess;
  t.mock.method(childProcess, "execFile", (...words: Parameters<typeof execFile>) => {
    const [name, args, options, done] = words as unknown as [string, string[], object, () => void];
    return execFile(name, args, { ...options, timeout: 300 }, done);
  });
  const environment = {
    PATH: `${folder}:${process.env.PATH}`,
    DOCKER_AUTH_CONFIG: JSON.stringify({ credsStore: "deaf" }),
  };
  const registry = await startRegistry({ auth: "basic" }, t);
  const reference = registry.add(image, "team/app", "1.0");
  const startedAt = performance.now();
  const outcome = await tryPull(t, reference, { ...HTTP, environment });
  assertFailed(outcome, "CREDENTIALS", "docker-credential-deaf has not answered");
  assert(performance.now() - startedAt < 20_000, "it was waited for");
});

// ====== What was typed ======

describe("a secret before a reference", () => {
  for (const prefix of [
    SECRETS.password,
    `${USER}:${SECRETS.password}`,
    `https://${USER}:${SECRETS.password}`,
  ]) {
    const typed = `${prefix}@127.0.0.1:1/team/app:1.0`;

    test(typed.replace(SECRETS.password, "SECRET"), async (t) => {
      const tar = join(temporaryFolder(t), "image.tar");
      for (const args of [
        [typed, tar],
        [typed, tar, "--parsed"],
        ["--parsed", typed],
        [typed, "--manifest", "list"],
      ]) {
        const { stdout, stderr } = await runCommand(args);
        assertClean(`${stdout}${stderr}`);
        assert.match(`${stdout}${stderr}`, /\*\*\*@127\.0\.0\.1:1\/team\/app:1\.0/);
      }
    });
  }
});
