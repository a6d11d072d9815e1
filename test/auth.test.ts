// Section 8: challenges, tokens, credential files, helpers, and above all where credentials never
// go.
import assert from "node:assert/strict";
import { chmodSync, existsSync, mkdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { describe, test } from "node:test";
import { setTimeout as delay } from "node:timers/promises";
import { internals } from "../imgpull.ts";
import { makeAuthority } from "./support/certificates.ts";
import {
  cleanEnvironment,
  runCommand,
  SECRETS,
  startCommand,
  type TestScope,
  temporaryFolder,
  USER,
} from "./support/command.ts";
import { makeImage, makeIndex } from "./support/image.ts";
import { startProxy } from "./support/proxy.ts";
import { assertFailed, assertPulled, type PullOptions, tryPull } from "./support/pull.ts";
import {
  type AuthOptions,
  type Fault,
  type Matcher,
  type Registry,
  type RegistryOptions,
  startRegistry,
} from "./support/registry.ts";

const image = makeImage({ seed: "auth", layers: [8192, 8192] });
const WRONG = "wrong-password";
const GIVEN = { username: USER, password: SECRETS.password };
const HTTP = { scheme: "http" } as const;

async function serve(t: TestScope, auth: AuthOptions, more: Omit<RegistryOptions, "auth"> = {}) {
  const registry = await startRegistry({ auth, ...more }, t);
  return { registry, reference: registry.add(image, "team/app", "1.0") };
}

const base64 = (text: string) => Buffer.from(text).toString("base64");
const basic = (user: string, password: string) => `Basic ${base64(`${user}:${password}`)}`;

/** A docker or podman file with one `auth` entry for each key. */
function authFile(entries: Record<string, string | object>): string {
  const auths = Object.entries(entries).map(([key, entry]) => [
    key,
    typeof entry === "string" ? { auth: base64(`${USER}:${entry}`) } : entry,
  ]);
  return JSON.stringify({ auths: Object.fromEntries(auths) });
}

const stored = (entries: Record<string, string | object>): PullOptions => ({
  ...HTTP,
  environment: { DOCKER_AUTH_CONFIG: authFile(entries) },
});

function sentTo(registry: Registry, server?: string): (string | undefined)[] {
  return registry
    .seen(server ? { where: (request) => request.server === server } : {})
    .map(({ headers }) => headers.authorization);
}

// ====== Challenges ======

type Challenges = [scheme: string, parameters: Record<string, string>][];

const HUB = { realm: "https://auth.test/token", service: "hub", scope: "repository:a/b:pull" };
const CHALLENGES: [name: string, lines: string[], expected: Challenges][] = [
  [
    "Docker Hub's",
    [`Bearer realm="${HUB.realm}",service="hub",scope="${HUB.scope}"`],
    [["bearer", HUB]],
  ],
  [
    "names in any case",
    ['BEARER Realm="r",SERVICE="s"'],
    [["bearer", { realm: "r", service: "s" }]],
  ],
  [
    "blanks wherever they may be",
    ['  Bearer   realm = "r" ,\t service = "s"  '],
    [["bearer", { realm: "r", service: "s" }]],
  ],
  [
    "no quotes",
    ["Bearer realm=https://h:1/token,service=s"],
    [["bearer", { realm: "https://h:1/token", service: "s" }]],
  ],
  [
    "commas in quotes",
    ['Bearer scope="repository:a:pull,push",realm="r"'],
    [["bearer", { scope: "repository:a:pull,push", realm: "r" }]],
  ],
  ["escapes in quotes", ['Basic realm="a \\"b\\", \\\\c"'], [["basic", { realm: 'a "b", \\c' }]]],
  [
    "a query in quotes",
    ['Bearer realm="https://h/t?a=1&b=x=y"'],
    [["bearer", { realm: "https://h/t?a=1&b=x=y" }]],
  ],
  ["empty values", ['Bearer realm="r",scope=""'], [["bearer", { realm: "r", scope: "" }]]],
  [
    "several in one header",
    ['Basic realm="b", Bearer realm="r",service="s"'],
    [
      ["basic", { realm: "b" }],
      ["bearer", { realm: "r", service: "s" }],
    ],
  ],
  [
    "several in several headers",
    ["Negotiate", 'Basic realm="b"', 'Bearer realm="r"'],
    [
      ["negotiate", {}],
      ["basic", { realm: "b" }],
      ["bearer", { realm: "r" }],
    ],
  ],
  [
    "a bare scheme first",
    ['Negotiate, Basic realm="b"'],
    [
      ["negotiate", {}],
      ["basic", { realm: "b" }],
    ],
  ],
  [
    "a bare scheme last",
    ['Basic realm="b", NTLM'],
    [
      ["basic", { realm: "b" }],
      ["ntlm", {}],
    ],
  ],
  [
    "a token68",
    ['Negotiate oYG2MIGz+/oAMKAQCh==, Bearer realm="r"'],
    [
      ["negotiate", {}],
      ["bearer", { realm: "r" }],
    ],
  ],
  [
    "quoted lists of other schemes",
    ['Digest qop="auth,auth-int", algorithm=MD5, Bearer realm="r"'],
    [
      ["digest", {}],
      ["bearer", { realm: "r" }],
    ],
  ],
  ["empty elements", [', ,Basic realm="b",,'], [["basic", { realm: "b" }]]],
  [
    "two of one scheme",
    ['Bearer realm="1", Bearer realm="2"'],
    [
      ["bearer", { realm: "1" }],
      ["bearer", { realm: "2" }],
    ],
  ],
  ["a parameter twice", ['Bearer realm="1",realm="2"'], [["bearer", { realm: "1" }]]],
  [
    "a quote that does not end",
    ['Bearer realm="https://h/t'],
    [["bearer", { realm: "https://h/t" }]],
  ],
  [
    "semicolons, a colon and single quotes",
    ["Bearer: realm='https://h/t'; service='s'; Basic realm='b'"],
    [
      ["bearer", { realm: "https://h/t", service: "s" }],
      ["basic", { realm: "b" }],
    ],
  ],
  [
    "no commas at all",
    ['Basic realm="b" Bearer realm="r" service="s"'],
    [
      ["basic", { realm: "b" }],
      ["bearer", { realm: "r", service: "s" }],
    ],
  ],
  [
    "a realm of several words, without quotes",
    ["BASIC realm=Sonatype Nexus Repository Manager, Bearer realm=r"],
    [
      ["basic", { realm: "Sonatype" }],
      ["bearer", { realm: "r" }],
    ],
  ],
  ["nothing", [""], []],
];

describe("the challenge parser", () => {
  for (const [name, lines, expected] of CHALLENGES) {
    test(name, () => {
      // The rest of a challenge is nobody's business here.
      const parsed = internals
        .parseChallenges(lines)
        .map(({ scheme, parameters }) => [
          scheme,
          Object.fromEntries(
            Object.entries(parameters).filter(([key]) =>
              ["realm", "service", "scope"].includes(key),
            ),
          ),
        ]);
      assert.deepEqual(parsed, expected);
    });
  }

  test("nonsense ends, and gives nothing that a token could be asked of", () => {
    const long = 16_384; // as much as Node takes for all headers together
    for (const line of [
      "====",
      '"',
      ",,,,",
      "=,=",
      " ".repeat(long),
      "a".repeat(long),
      ",".repeat(long),
      '"'.repeat(long),
      "a=".repeat(long / 2),
      `Bearer ${"\\".repeat(long)}`,
    ]) {
      const realms = internals.parseChallenges([line]).map(({ parameters }) => parameters.realm);
      assert.deepEqual(
        realms.filter((realm) => realm !== undefined),
        [],
        line.slice(0, 20),
      );
    }
  });
});

// ====== Which challenge is answered ======

const NO_REALM: [name: string, challenge: (usual: string) => string[]][] = [
  ["before it", (usual) => ['Bearer service="x"', usual]],
  ["after it", (usual) => [usual, "Bearer"]],
  ["in the same header", (usual) => [`Bearer service="x", ${usual}`]],
  ["with an empty one", (usual) => [`Bearer realm="", ${usual}`]],
];

describe("a Bearer challenge without a realm", () => {
  for (const [name, challenge] of NO_REALM) {
    test(`beside Basic, ${name}: Basic is used`, async (t) => {
      const registry = await startRegistry({ auth: { mode: "basic", challenge } }, t);
      const reference = registry.add(image, "team/app", "1.0");
      assertPulled(await tryPull(t, reference, { ...HTTP, ...GIVEN }), image);
    });
  }

  test("beside a Bearer challenge with one: that is used, whatever their order", async (t) => {
    for (const isFirst of [true, false]) {
      const challenge = (usual: string) =>
        isFirst ? ["Bearer", usual, 'Basic realm="b"'] : ['Basic realm="b"', usual, "Bearer"];
      const registry = await startRegistry({ auth: { mode: "bearer", challenge } }, t);
      const reference = registry.add(image, "team/app", "1.0");
      assertPulled(await tryPull(t, reference, { ...HTTP, ...GIVEN }), image);
    }
  });

  test("alone is said to be none", async (t) => {
    const auth = { mode: "bearer", challenge: () => ["Bearer"] } as const;
    const registry = await startRegistry({ auth }, t);
    const reference = registry.add(image, "team/app", "1.0");
    const outcome = await tryPull(t, reference, { ...HTTP, ...GIVEN });
    assertFailed(outcome, "PROTOCOL", "names no usable realm for its tokens");
  });
});

// ====== Tokens ======

const SCOPE = "repository:team/app:pull";
const SERVICE = "test-registry";

const TOKEN_REQUESTS: [name: string, auth: Partial<AuthOptions>, query: [string, string][]][] = [
  [
    "service and scope",
    {},
    [
      ["service", SERVICE],
      ["scope", SCOPE],
    ],
  ],
  ["no service", { service: null }, [["scope", SCOPE]]],
  [
    "no scope",
    { scope: null },
    [
      ["service", SERVICE],
      ["scope", SCOPE],
    ],
  ],
  [
    "any scope",
    { scope: "*" },
    [
      ["service", SERVICE],
      ["scope", SCOPE],
    ],
  ],
  [
    "a scope to push too",
    { scope: "repository:team/app:pull,push" },
    [
      ["service", SERVICE],
      ["scope", SCOPE],
    ],
  ],
  [
    "a relative realm",
    { realm: "/token" },
    [
      ["service", SERVICE],
      ["scope", SCOPE],
    ],
  ],
  [
    "a realm with a query",
    { realm: "/token?account=me" },
    [
      ["account", "me"],
      ["service", SERVICE],
      ["scope", SCOPE],
    ],
  ],
  [
    "a realm with a scope",
    { realm: "/token?scope=repository:x:pull&a=1", service: null },
    [
      ["scope", SCOPE],
      ["a", "1"],
    ],
  ],
  [
    "a token service elsewhere",
    { tokenServer: "second" },
    [
      ["service", SERVICE],
      ["scope", SCOPE],
    ],
  ],
  [
    "access_token",
    { tokenField: "access_token" },
    [
      ["service", SERVICE],
      ["scope", SCOPE],
    ],
  ],
  [
    "token and access_token",
    { tokenField: "both" },
    [
      ["service", SERVICE],
      ["scope", SCOPE],
    ],
  ],
  ...[0, -1, 1, 59, 3600, 1e15, "300", null, {}].map(
    (expiresIn): (typeof TOKEN_REQUESTS)[number] => [
      `expires_in ${JSON.stringify(expiresIn)}`,
      { expiresIn },
      [
        ["service", SERVICE],
        ["scope", SCOPE],
      ],
    ],
  ),
];

describe("one token for the whole pull", () => {
  for (const [name, auth, query] of TOKEN_REQUESTS) {
    test(name, async (t) => {
      const { registry, reference } = await serve(t, { mode: "bearer", ...auth });
      assertPulled(await tryPull(t, reference, HTTP), image);
      const [request, ...more] = registry.tokenRequests();
      assert.deepEqual(more, []);
      assert.equal(request?.method, "GET");
      assert.equal(request.headers.authorization, undefined);
      const asked = [...request.query].sort();
      assert.deepEqual(asked, [...query].sort());
    });
  }
});

test("credentials go to the token service only, the token to the registry only", async (t) => {
  const { registry, reference } = await serve(t, {
    mode: "bearer",
    anonymous: "refused",
    tokenServer: "second",
  });
  assertPulled(await tryPull(t, reference, { ...HTTP, ...GIVEN }), image);
  assert.deepEqual(sentTo(registry, "token"), [basic(USER, SECRETS.password)]);
  const [first, ...rest] = sentTo(registry, "registry");
  assert.equal(first, undefined);
  assert.deepEqual(new Set(rest), new Set([`Bearer ${SECRETS.bearerToken}1`]));
});

test("Basic: refused once, then sent with every request", async (t) => {
  const { registry, reference } = await serve(t, { mode: "basic" });
  assertPulled(await tryPull(t, reference, { ...HTTP, ...GIVEN }), image);
  const statuses = registry.requests.map(({ status }) => status);
  assert.deepEqual(statuses, [401, 200, 200, 200, 200]);
});

test("an outside token is sent as it is, with the first request, and is never exchanged", async (t) => {
  for (const mode of ["basic", "bearer"] as const) {
    const { registry, reference } = await serve(t, { mode, outsideToken: SECRETS.outsideToken });
    assertPulled(await tryPull(t, reference, { ...HTTP, token: SECRETS.outsideToken }), image);
    assert.deepEqual(new Set(sentTo(registry)), new Set([`Basic ${SECRETS.outsideToken}`]));
    registry.forget();
    assertFailed(
      await tryPull(t, reference, { ...HTTP, token: "b3V0ZGF0ZWQ=" }),
      "UNAUTHORIZED",
      "`token`",
    );
    assert.deepEqual(
      registry.requests.map(({ kind }) => kind),
      ["manifest"],
    );
  }
});

const BAD_TOKENS: [name: string, body: string][] = [
  ["HTML", "<html><body>Sign in</body></html>"],
  ["nothing", ""],
  ["no token", '{"expires_in":300}'],
  ["an empty token", '{"token":""}'],
  ["a number", '{"token":42}'],
  ["null", "null"],
  ["a token that would end the header", JSON.stringify({ token: "a\r\nX-Injected: 1" })],
];

test("an answer without a usable token is refused by name", async (t) => {
  for (const [name, body] of BAD_TOKENS) {
    const { registry, reference } = await serve(t, { mode: "bearer" });
    registry.on({ kind: "token" }, { body });
    assertFailed(await tryPull(t, reference, HTTP), "PROTOCOL", "/token answered without a token");
    assert.equal(registry.tokenRequests().length, 1, name);
  }
});

test("a challenge that names no usable realm is refused by name", async (t) => {
  for (const challenge of ['Bearer service="s"', 'Bearer realm=""', 'Bearer realm="http://"']) {
    const { registry, reference } = await serve(t, {
      mode: "bearer",
      challenge: () => [challenge],
    });
    assertFailed(await tryPull(t, reference, HTTP), "PROTOCOL", /realm/);
    assert.equal(registry.requests.length, 1);
  }
});

const INSIDE = [
  "http://127.0.0.2:1/token",
  "http://10.1.2.3/token",
  "http://172.31.0.1/token",
  "http://192.168.1.1/token",
  "http://169.254.169.254/latest/meta-data",
  "http://2852039166/latest/meta-data",
  "http://0.0.0.0:1/token",
  "http://[::1]:1/token",
  "http://[fd00:ec2::254]/latest/meta-data",
  "http://[fe80::1]/token",
  "http://[::ffff:169.254.169.254]/token",
];

test("a realm inside a network where the registry is not gets no request, whoever asks", async (t) => {
  for (const realm of INSIDE) {
    for (const options of [HTTP, { ...HTTP, ...GIVEN }]) {
      const { registry, reference } = await serve(t, { mode: "bearer", realm });
      const outcome = await tryPull(t, reference, options);
      assertFailed(outcome, "PROTOCOL", "token endpoint", "inside a network");
      assert.equal(registry.requests.length, 1, realm);
    }
  }
});

test("a realm of that kind is right for a registry on that very host only", async (t) => {
  const authority = makeAuthority();
  const tls = authority.issueServer({ dns: ["registry.test"] });
  const caCert = fileIn(temporaryFolder(t), "ca.pem", authority.cert);
  const { registry } = await serve(t, { mode: "bearer", tokenServer: "second" }, { tls });
  const proxy = await startProxy(t, { hosts: { "registry.test:443": registry.host } });
  const environment = { HTTPS_PROXY: proxy.url };
  const outcome = await tryPull(t, "registry.test/team/app:1.0", { caCert, environment, ...GIVEN });
  assertFailed(outcome, "PROTOCOL", "inside a network");
  assert.equal(registry.connections("token"), 0);
  assertPulled(await tryPull(t, `${registry.host}/team/app:1.0`, { caCert, ...GIVEN }), image);
});

test("a token service that fails for a while is asked again", async (t) => {
  const faults = [{ status: 503 }, { status: 429, headers: { "retry-after": "7" } }];
  const { registry, reference } = await serve(t, { mode: "bearer" });
  const rules = faults.map((fault) => registry.on({ kind: "token", times: 1 }, fault));
  const outcome = await tryPull(t, reference, HTTP);
  assertPulled(outcome, image);
  assert.deepEqual(
    rules.map(({ hits }) => hits),
    [1, 1],
  );
  assert.deepEqual(outcome.waitsMs, [internals.LIMITS.firstBackoffMs, 7000]);
});

// ====== Identity tokens ======

const IDENTITY = { identitytoken: SECRETS.identityToken };

test("an identity token is exchanged by POST, and goes nowhere else", async (t) => {
  const { registry, reference } = await serve(t, { mode: "bearer", anonymous: "refused" });
  assertPulled(await tryPull(t, reference, stored({ [registry.host]: IDENTITY })), image);
  const [request, ...more] = registry.tokenRequests();
  assert.deepEqual(more, []);
  assert.equal(request?.method, "POST");
  assert.equal(request.headers["content-type"], "application/x-www-form-urlencoded");
  assert.equal(request.headers.authorization, undefined);
  assert.deepEqual(Object.fromEntries(new URLSearchParams(request.body)), {
    grant_type: "refresh_token",
    refresh_token: SECRETS.identityToken,
    service: SERVICE,
    scope: SCOPE,
    client_id: "imgpull",
  });
  for (const { url, headers } of registry.requests) {
    assert(!`${url} ${JSON.stringify(headers)}`.includes(SECRETS.identityToken), url);
  }
});

test("where POST is not served, the identity token is the password of a GET", async (t) => {
  const NOBODY = "00000000-0000-0000-0000-000000000000"; // the name that Azure documents for it
  for (const postStatus of [302, 307, 400, 401, 402, 403, 404, 405, 406, 410, 411, 415, 422, 501]) {
    for (const [user, entry] of [
      [NOBODY, IDENTITY],
      [USER, { ...IDENTITY, auth: base64(`${USER}:`) }],
    ] as const) {
      const auth = {
        mode: "bearer",
        anonymous: "refused",
        user,
        password: SECRETS.identityToken,
        postStatus,
      } as const;
      const { registry, reference } = await serve(t, auth);
      assertPulled(await tryPull(t, reference, stored({ [registry.host]: entry })), image);
      assert.deepEqual(
        registry.tokenRequests().map(({ method }) => method),
        ["POST", "GET"],
      );
    }
  }
});

test("a POST that is answered by what is no token is followed by a GET", async (t) => {
  for (const body of ["<!DOCTYPE html><title>Sign in</title>", "", "{}", '{"token":""}', "[]"]) {
    const auth = { mode: "bearer", anonymous: "refused", password: SECRETS.identityToken } as const;
    const { registry, reference } = await serve(t, auth);
    registry.on({ kind: "token", method: "POST" }, { status: 200, body });
    const entry = { ...IDENTITY, auth: base64(`${USER}:`) };
    assertPulled(await tryPull(t, reference, stored({ [registry.host]: entry })), image);
    const methods = registry.tokenRequests().map(({ method }) => method);
    assert.deepEqual(methods, ["POST", "GET"], body);
  }
});

test("a token service that fails at POST for a while is asked by POST again", async (t) => {
  const { registry, reference } = await serve(t, { mode: "bearer", anonymous: "refused" });
  const statuses = [502, 503, 429, 408];
  const rules = statuses.map((status) => registry.on({ kind: "token", times: 1 }, { status }));
  assertPulled(await tryPull(t, reference, stored({ [registry.host]: IDENTITY })), image);
  assert(rules.every(({ hits }) => hits === 1));
  const methods = registry.tokenRequests().map(({ method }) => method);
  assert.deepEqual(methods, ["POST", "POST", "POST", "POST", "POST"]);
});

test("an identity token that is refused is warned about before anything anonymous is tried", async (t) => {
  const { registry, reference } = await serve(t, { mode: "bearer" });
  const warnedAt: number[] = [];
  const outcome = await tryPull(t, reference, {
    ...stored({ [registry.host]: { identitytoken: "revoked" } }),
    onWarning: () =>
      warnedAt.push(
        registry
          .tokenRequests()
          .filter(({ method, headers }) => method === "GET" && headers.authorization === undefined)
          .length,
      ),
  });
  assertPulled(outcome, image);
  assert.deepEqual(warnedAt, [0]);
});

// ====== Credential files ======

interface Place {
  name: string;
  put: (home: string, text: string) => Record<string, string>;
}

function fileIn(home: string, path: string, text: string): string {
  mkdirSync(dirname(join(home, path)), { recursive: true });
  writeFileSync(join(home, path), text);
  return join(home, path);
}

const PLACES: Place[] = [
  {
    name: "REGISTRY_AUTH_FILE",
    put: (home, text) => ({ REGISTRY_AUTH_FILE: fileIn(home, "named.json", text) }),
  },
  { name: "DOCKER_AUTH_CONFIG", put: (_home, text) => ({ DOCKER_AUTH_CONFIG: text }) },
  {
    name: "DOCKER_CONFIG",
    put: (home, text) => ({ DOCKER_CONFIG: dirname(fileIn(home, "docker/config.json", text)) }),
  },
  {
    name: ".docker",
    put: (home, text) => ({ HOME: home, _file: fileIn(home, ".docker/config.json", text) }),
  },
  {
    name: "XDG_RUNTIME_DIR",
    put: (home, text) => ({
      XDG_RUNTIME_DIR: join(home, "run"),
      _file: fileIn(home, "run/containers/auth.json", text),
    }),
  },
  {
    name: "XDG_CONFIG_HOME",
    put: (home, text) => ({
      XDG_CONFIG_HOME: join(home, "settings"),
      _file: fileIn(home, "settings/containers/auth.json", text),
    }),
  },
  {
    name: ".config",
    put: (home, text) => ({
      HOME: home,
      _file: fileIn(home, ".config/containers/auth.json", text),
    }),
  },
  {
    name: ".dockercfg",
    put: (home, text) => ({
      HOME: home,
      _file: fileIn(home, ".dockercfg", JSON.stringify(JSON.parse(text).auths)),
    }),
  },
];

/** The first stands for the second, which is then not read. */
const INSTEAD: Record<string, string> = { DOCKER_CONFIG: ".docker", XDG_CONFIG_HOME: ".config" };

describe("where credentials are looked for", () => {
  for (const [index, place] of PLACES.entries()) {
    const rest = PLACES.slice(index + 1)
      .map(({ name }) => name)
      .join(", ");
    test(`${place.name}, before ${rest || "nothing else"}`, async (t) => {
      const { registry, reference } = await serve(t, { mode: "basic" });
      const home = temporaryFolder(t);
      const lower = PLACES.slice(index + 1).filter(({ name }) => name !== INSTEAD[place.name]);
      const environment = Object.assign(
        {},
        ...lower.map(({ put }) => put(home, authFile({ [registry.host]: WRONG }))),
        place.put(home, authFile({ [registry.host]: SECRETS.password })),
      ) as Record<string, string>;
      assertPulled(await tryPull(t, reference, { ...HTTP, environment }), image);
      assert(!sentTo(registry).includes(basic(USER, WRONG)));
    });
  }

  test("a place that does not know the registry leaves the question to the next", async (t) => {
    const { registry, reference } = await serve(t, { mode: "basic" });
    const home = temporaryFolder(t);
    const other = authFile({ "other.test": WRONG, [registry.host]: {} });
    const others = PLACES.slice(0, -1).map(({ put }) => put(home, other));
    const last = PLACES.at(-1)?.put(home, authFile({ [registry.host]: SECRETS.password }));
    const environment = Object.assign({}, ...others, last) as Record<string, string>;
    assertPulled(await tryPull(t, reference, { ...HTTP, environment }), image);
  });

  test("--user before all of them", async (t) => {
    const { registry, reference } = await serve(t, { mode: "basic" });
    assertPulled(
      await tryPull(t, reference, { ...stored({ [registry.host]: WRONG }), ...GIVEN }),
      image,
    );
    assert(!sentTo(registry).includes(basic(USER, WRONG)));
  });

  for (const [variable, name] of Object.entries(INSTEAD)) {
    test(`${variable} stands for ~/${name}, which is then not read`, async (t) => {
      const { registry, reference } = await serve(t, { mode: "basic" });
      const home = temporaryFolder(t);
      const file = authFile({ [registry.host]: SECRETS.password });
      const environment = PLACES.find((place) => place.name === name)?.put(home, file) ?? {};
      mkdirSync(join(home, "empty"));
      assertFailed(
        await tryPull(t, reference, {
          ...HTTP,
          environment: { ...environment, [variable]: join(home, "empty") },
        }),
        "UNAUTHORIZED",
        "no credentials were found",
      );
      assertPulled(await tryPull(t, reference, { ...HTTP, environment }), image);
    });
  }

  test("without XDG_RUNTIME_DIR, what podman login writes below /run", async (t) => {
    const folder = `/run/containers/${process.getuid?.()}`;
    const file = join(folder, "auth.json");
    const { registry, reference } = await serve(t, { mode: "basic" });
    try {
      mkdirSync(folder, { recursive: true });
      const text = authFile({ [registry.host]: SECRETS.password });
      writeFileSync(file, text, { flag: "wx", mode: 0o600 });
    } catch (error) {
      return t.skip(`*** not tried: ${(error as Error).message} ***`);
    }
    t.after(() => rmSync(file));
    const environment = { XDG_RUNTIME_DIR: undefined };
    assertPulled(await tryPull(t, reference, { ...HTTP, environment }), image);
    assertFailed(await tryPull(t, reference, HTTP), "UNAUTHORIZED");
  });
});

const KEYS: [key: string, matches: boolean][] = [
  ["HOST", true],
  ["https://HOST", true],
  ["http://HOST", true],
  ["HTTPS://HOST", true],
  ["https://HOST/", true],
  ["https://HOST/v1/", true],
  ["https://HOST/v2/", true],
  ["https://HOST/v2/_catalog", true],
  ["HOST/team", true],
  ["HOST/team/app", true],
  ["HOST/team/ap", true],
  ["HOST/team/app/more", true],
  ["HOST/other/path", true],
  ["127.0.0.1", false],
  ["127.0.0.1:1", false],
  ["xHOST", false],
  ["HOST.test", false],
  ["https://user@HOST", false],
];

test("which keys of a credential file are for which registry", async (t) => {
  for (const [key, matches] of KEYS) {
    const { registry, reference } = await serve(t, { mode: "basic" });
    const outcome = await tryPull(
      t,
      reference,
      stored({ [key.replace("HOST", registry.host)]: SECRETS.password }),
    );
    if (matches) assertPulled(outcome, image);
    else assertFailed(outcome, "UNAUTHORIZED", "no credentials were found");
    if (!matches) assert.deepEqual(sentTo(registry), [undefined], key);
  }
});

test("the longest path wins, in any order", async (t) => {
  const {
    registry: { host },
    registry,
    reference,
  } = await serve(t, { mode: "basic" });
  const entries = { [host]: WRONG, [`${host}/team`]: SECRETS.password, [`${host}/te`]: WRONG };
  assertPulled(await tryPull(t, reference, stored(entries)), image);
  assertPulled(
    await tryPull(t, reference, stored(Object.fromEntries(Object.entries(entries).reverse()))),
    image,
  );
  assert(!sentTo(registry).includes(basic(USER, WRONG)));
});

test("where no path leads to the repository, the shortest of the host's", async (t) => {
  const {
    registry: { host },
    registry,
    reference,
  } = await serve(t, { mode: "basic" });
  const entries = { [`${host}/other/more`]: WRONG, [`${host}/other`]: SECRETS.password };
  assertPulled(await tryPull(t, reference, stored(entries)), image);
  assert(!sentTo(registry).includes(basic(USER, WRONG)));
});

test("a host in any case, with its scheme's port or without it", async (t) => {
  const authority = makeAuthority();
  const tls = authority.issueServer({ dns: ["registry.test"] });
  const caCert = fileIn(temporaryFolder(t), "ca.pem", authority.cert);
  const keys: [key: string, written: string][] = [
    ["registry.test", "registry.test:443"],
    ["registry.test:443", "registry.test"],
    ["HTTPS://Registry.TEST:443/v1/", "registry.test"],
    ["registry.test", "Registry.Test"],
  ];
  for (const [key, host] of keys) {
    const { registry } = await serve(t, { mode: "basic" }, { tls });
    const proxy = await startProxy(t, { hosts: { "registry.test:443": registry.host } });
    const environment = {
      HTTPS_PROXY: proxy.url,
      DOCKER_AUTH_CONFIG: authFile({ "registry.test:80": WRONG, [key]: SECRETS.password }),
    };
    assertPulled(await tryPull(t, `${host}/team/app:1.0`, { caCert, environment }), image);
    assert(!sentTo(registry).includes(basic(USER, WRONG)), key);
  }
});

test("the forms of an entry", async (t) => {
  const password = 'p:ä s"w';
  const entries = [
    { auth: base64(`${USER}:${password}`) },
    { auth: base64(`${USER}:${password}\0\0`) },
    { username: USER, password },
    { username: "other", password: "other", auth: base64(`${USER}:${password}`) },
  ];
  for (const entry of entries) {
    const { registry, reference } = await serve(t, { mode: "basic", password });
    assertPulled(await tryPull(t, reference, stored({ [registry.host]: entry })), image);
  }
});

test("Docker Hub: every name that a credential file has for it, over the proxy to registry-1.docker.io", async (t) => {
  const authority = makeAuthority();
  const tls = authority.issueServer({ dns: ["registry-1.docker.io"] });
  const file = fileIn(temporaryFolder(t), "ca.pem", authority.cert);
  const keys = [
    "https://index.docker.io/v1/",
    "index.docker.io",
    "docker.io",
    "registry-1.docker.io",
    "docker.io/library",
  ];
  for (const key of keys) {
    const auth = { mode: "bearer", anonymous: "refused", realm: "/token" } as const;
    const { registry } = await serve(t, auth, { tls });
    registry.add(image, "library/busybox", "latest");
    const proxy = await startProxy(t, { hosts: { "registry-1.docker.io:443": registry.host } });
    const environment = {
      SSL_CERT_FILE: file,
      HTTPS_PROXY: proxy.url,
      DOCKER_AUTH_CONFIG: authFile({ [key]: SECRETS.password }),
    };
    assertPulled(await tryPull(t, "busybox", { environment }), image);
    assert.equal(registry.requests[0]?.path, "/v2/library/busybox/manifests/latest");
    assert.deepEqual(
      new Set(proxy.requests.map(({ target }) => target)),
      new Set(["registry-1.docker.io:443"]),
    );
  }
});

const BROKEN: [name: string, text: string | undefined, words: RegExp][] = [
  ["not JSON", `{"auths": ${SECRETS.password}`, /JSON/],
  ["a list", "[]", /JSON object/],
  [
    "an auth that is not one",
    authFile({ HOST: { auth: base64(SECRETS.password) } }),
    /"auth" is not USER:PASSWORD/,
  ],
  ["a folder", undefined, /directory/],
  ["too large", `{"auths":{}}${" ".repeat(internals.LIMITS.credentialFileBytes)}`, /large/],
];

test("a broken credential file is an error that names it and quotes nothing, never an anonymous pull", async (t) => {
  for (const [name, text, words] of BROKEN) {
    const { registry, reference } = await serve(t, { mode: "bearer" });
    const home = temporaryFolder(t);
    const file = join(home, ".docker/config.json");
    if (text === undefined) mkdirSync(file, { recursive: true });
    else fileIn(home, ".docker/config.json", text.replace("HOST", registry.host));
    const outcome = await tryPull(t, reference, { ...HTTP, environment: { HOME: home } });
    assertFailed(outcome, "CREDENTIALS", file, words);
    assert(!outcome.error?.message.includes(SECRETS.password.slice(0, 8)), name);
    assert.deepEqual(registry.tokenRequests(), [], name);
  }
});

test("a REGISTRY_AUTH_FILE that is missing is an error; the other places may be empty", async (t) => {
  const { registry, reference } = await serve(t, { mode: "bearer" });
  const environment = { REGISTRY_AUTH_FILE: "/nowhere/auth.json" };
  const outcome = await tryPull(t, reference, { ...HTTP, environment });
  assertFailed(outcome, "CREDENTIALS", "REGISTRY_AUTH_FILE", "/nowhere/auth.json");
  assert.deepEqual(registry.tokenRequests(), []);
  assertPulled(await tryPull(t, reference, HTTP), image);
});

// ====== Credential helpers ======

/** A folder with docker-credential-test, which keeps what it was asked beside it. */
function helper(t: TestScope, script: string) {
  const folder = temporaryFolder(t);
  const program = join(folder, "docker-credential-test");
  writeFileSync(program, `#!/bin/sh\necho "$*" > "$0.args"\ncat > "$0.stdin"\n${script}\n`);
  chmodSync(program, 0o755);
  const asked = () => ({
    args: readFileSync(`${program}.args`, "utf8").trim(),
    stdin: readFileSync(`${program}.stdin`, "utf8").trim(),
  });
  return {
    asked,
    path: `${folder}:${cleanEnvironment().PATH}`,
    isAsked: () => existsSync(`${program}.args`),
  };
}

const answer = (Username: string, Secret: string) =>
  `echo '${JSON.stringify({ ServerURL: "x", Username, Secret })}'`;

interface HelperCase {
  name: string;
  config: (host: string) => object;
  script?: string;
  auth?: Partial<AuthOptions>;
  /** The words of the failure; absent where the pull succeeds. */
  fails?: RegExp;
}

const RIGHT = answer(USER, SECRETS.password);
const HELPERS: HelperCase[] = [
  { name: "credHelpers", config: (host) => ({ credHelpers: { [host]: "test" } }), script: RIGHT },
  {
    name: "credsStore",
    config: (host) => ({ auths: { [host]: {} }, credsStore: "test" }),
    script: RIGHT,
  },
  {
    name: "credHelpers before credsStore and auths",
    script: RIGHT,
    config: (host) => ({
      ...JSON.parse(authFile({ [host]: WRONG })),
      credHelpers: { [host]: "test" },
      credsStore: "missing",
    }),
  },
  {
    name: "an identity token",
    config: (host) => ({ credHelpers: { [host]: "test" } }),
    script: answer("<token>", SECRETS.identityToken),
  },
  {
    name: "credentials not found means anonymous",
    config: () => ({ credsStore: "test" }),
    script: "echo credentials not found in native keychain; exit 1",
    auth: { anonymous: "welcome" },
  },
  {
    name: "a helper that is not there",
    config: () => ({ credsStore: "missing" }),
    auth: { anonymous: "welcome" },
    fails: /docker-credential-missing .*not on the PATH/,
  },
  {
    name: "a helper that fails",
    config: () => ({ credsStore: "test" }),
    script: "echo not to be shown; echo the keychain is locked >&2; exit 1",
    auth: { anonymous: "welcome" },
    fails: /docker-credential-test failed: the keychain is locked/,
  },
  {
    name: "a helper that does not speak JSON",
    config: () => ({ credsStore: "test" }),
    auth: { anonymous: "welcome" },
    script: `echo 'secret=${SECRETS.password}'`,
    fails: /docker-credential-test answered what is not a JSON object/,
  },
  ...["echo '{}'", "true", "echo", answer("", "")].map((script) => ({
    name: `a helper that has none: ${script}`,
    config: () => ({ credsStore: "test" }),
    auth: { anonymous: "welcome" as const },
    script,
  })),
  ...["'[]'", "null", "42"].map((words) => ({
    name: `a helper that answers ${words}`,
    config: () => ({ credsStore: "test" }),
    auth: { anonymous: "welcome" as const },
    script: `echo ${words}`,
    fails: /docker-credential-test answered what is not a JSON object/,
  })),
  {
    name: "a helper without a secret",
    config: () => ({ credsStore: "test" }),
    auth: { anonymous: "welcome" },
    script: `echo '{"Username":"${USER}"}'`,
    fails: /docker-credential-test answered without a Secret/,
  },
  {
    name: "a name that is a path",
    config: () => ({ credsStore: "../test" }),
    auth: { anonymous: "welcome" },
    fails: /docker-credential-..\/test has a name that is not one/,
  },
];

describe("credential helpers", () => {
  for (const { name, config, script = "exit 9", auth, fails } of HELPERS) {
    test(name, async (t) => {
      const { registry, reference } = await serve(t, {
        mode: "bearer",
        anonymous: "refused",
        ...auth,
      });
      const { asked, path } = helper(t, script);
      const tar = join(temporaryFolder(t), "image.tar");
      const result = await runCommand(
        [reference, tar, "--scheme", "http", "--os", "linux", "--arch", "amd64"],
        {
          env: { PATH: path, DOCKER_AUTH_CONFIG: JSON.stringify(config(registry.host)) },
          guardMs: 20_000,
        },
      );
      assert.equal(result.exitCode, fails ? 1 : 0, result.stderr);
      assert.equal(existsSync(tar), !fails);
      if (fails) assert.match(result.stderr, fails);
      else assert.deepEqual(asked(), { args: "get", stdin: registry.host });
      if (fails) assert.deepEqual(registry.tokenRequests(), []);
    });
  }

  test("Ctrl-C is heard while a helper waits, whatever it traps", async (t) => {
    const { reference, registry } = await serve(t, { mode: "basic" });
    const { path, isAsked } = helper(t, "trap '' INT TERM; exec sleep 30");
    const tar = join(temporaryFolder(t), "image.tar");
    const env = { PATH: path, DOCKER_AUTH_CONFIG: '{"credsStore":"test"}' };
    const running = startCommand([reference, tar, "--scheme", "http"], { env, guardMs: 10_000 });
    while (!isAsked()) await delay(20);
    running.child.kill("SIGINT");
    const { exitCode } = await running.result;
    assert.equal(exitCode, 130);
    assert.equal(registry.requests.length, 1);
  });

  test("two repositories of one host ask their helper once", async (t) => {
    const { reference, registry } = await serve(t, { mode: "basic" });
    registry.add(makeImage({ seed: "other" }), "team/other", "1.0");
    const counted = join(temporaryFolder(t), "counted");
    const { path } = helper(t, `echo x >> ${counted}; ${RIGHT}`);
    const tar = join(temporaryFolder(t), "image.tar");
    const env = { PATH: path, DOCKER_AUTH_CONFIG: '{"credsStore":"test"}' };
    const images = [reference, reference.replace("team/app", "team/other")];
    const args = ["--scheme", "http", "--platform", "linux/amd64"];
    const { exitCode, stderr } = await runCommand([...images, tar, ...args], { env });
    assert.equal(exitCode, 0, stderr);
    assert.equal(readFileSync(counted, "utf8"), "x\n");
  });

  test("a helper is not run for a registry that asks for nothing", async (t) => {
    const { reference } = await serve(t, { mode: "none" });
    const { path, isAsked } = helper(t, RIGHT);
    const tar = join(temporaryFolder(t), "image.tar");
    const env = { PATH: path, DOCKER_AUTH_CONFIG: '{"credsStore":"test"}' };
    const { exitCode } = await runCommand([reference, tar, "--scheme", "http"], { env });
    assert.equal(exitCode, 0);
    assert(!isAsked());
  });
});

// ====== Refusals ======

test("stored credentials refused for a public image: one warning with their source, then anonymous", async (t) => {
  for (const refusedStatus of [401, 403]) {
    const { registry, reference } = await serve(t, { mode: "bearer", refusedStatus });
    const outcome = await tryPull(t, reference, stored({ [registry.host]: WRONG }));
    assertPulled(outcome, image);
    assert.equal(outcome.warnings.length, 1);
    assert.match(outcome.warnings[0] ?? "", /DOCKER_AUTH_CONFIG/);
    assert.deepEqual(sentTo(registry).slice(1, 3), [basic(USER, WRONG), undefined]);
    assert.deepEqual(outcome.waitsMs, []);
  }
});

const REFUSALS: [name: string, options: (host: string) => PullOptions, words: RegExp][] = [
  ["none", () => HTTP, /no credentials were found/],
  ["--user", () => ({ ...HTTP, username: USER, password: WRONG }), /`username`/],
  ["a file's", (host) => stored({ [host]: WRONG }), /DOCKER_AUTH_CONFIG|stored credentials/],
];

test("stored credentials that are refused to many requests at once are warned of once", async (t) => {
  const { registry, reference } = await serve(t, { mode: "none" });
  registry.add(makeImage({ seed: "other" }), "team/app", "2.0");
  const challenge = { "www-authenticate": 'Basic realm="test"' };
  const isFirst = { where: ({ kind }: { kind: string }) => kind === "manifest", times: 1 };
  registry.on(isFirst, { status: 401, headers: challenge });
  registry.on(
    { where: ({ headers }) => headers.authorization !== undefined },
    { status: 401, headers: challenge },
  );
  const tar = join(temporaryFolder(t), "all.tar");
  const env = { DOCKER_AUTH_CONFIG: authFile({ [registry.host]: WRONG }) };
  const images = [reference, reference.replace("1.0", "2.0")];
  const args = ["--scheme", "http", "--platform", "linux/amd64"];
  const { stderr } = await runCommand([...images, tar, ...args], { env });
  assert.equal(stderr.split("trying without any").length, 2, stderr);
});

for (const status of [401, 403]) {
  test(`stored credentials that one repository wants do not close a public one beside it (${status})`, async (t) => {
    const { registry, reference } = await serve(t, { mode: "none" });
    registry.add(makeImage({ seed: "private" }), "team/private", "1.0");
    registry.on(
      { repository: "team/private", where: ({ headers }) => headers.authorization === undefined },
      { status: 401, headers: { "www-authenticate": 'Basic realm="test"' } },
    );
    const refusal = registry.on(
      { repository: "team/app", where: ({ headers }) => headers.authorization !== undefined },
      { status },
    );
    const tar = join(temporaryFolder(t), "all.tar");
    const env = { DOCKER_AUTH_CONFIG: authFile({ [registry.host]: WRONG }) };
    const images = [reference.replace("team/app", "team/private"), reference];
    const args = ["--scheme", "http", "--platform", "linux/amd64"];
    const { exitCode, stderr } = await runCommand([...images, tar, ...args], { env });
    assert.equal(exitCode, 0, stderr);
    assert(refusal.hits > 0);
    assert.equal(stderr.split("trying without any").length, 2, stderr);
  });
}

test("a private image: the error says which credentials were tried, and asks no more than that takes", async (t) => {
  for (const mode of ["basic", "bearer"] as const) {
    for (const [name, options, words] of REFUSALS) {
      const { registry, reference } = await serve(t, { mode, anonymous: "refused" });
      const outcome = await tryPull(t, reference, options(registry.host));
      assertFailed(outcome, "UNAUTHORIZED", "401", words);
      assert.deepEqual(outcome.waitsMs, [], `${mode}, ${name}: 401 is not retried`);
      assert(
        registry.requests.length <= 5,
        `${mode}, ${name}: ${registry.requests.length} requests`,
      );
      const anonymous = registry
        .tokenRequests()
        .filter(({ headers }) => headers.authorization === undefined);
      if (name === "--user") assert.deepEqual(anonymous, []);
      if (name === "a file's") assert.match(outcome.warnings.join(), /DOCKER_AUTH_CONFIG/);
    }
  }
});

test("a token that opens nothing ends the pull after at most one new one", async (t) => {
  const { registry, reference } = await serve(t, { mode: "bearer", anonymous: "useless" });
  assertFailed(await tryPull(t, reference, HTTP), "UNAUTHORIZED", "401");
  assert(registry.tokenRequests().length <= 2);
});

// ====== Credentials that nobody asked for ======

/** What nobody is answered at the manifest, while /v2/ has a challenge. */
const SILENT: [name: string, fault: Fault][] = [
  ["403", { status: 403 }],
  ["404", { status: 404 }],
  ["401 without a challenge", { status: 401 }],
  ["401 with an empty challenge", { status: 401, headers: { "www-authenticate": "" } }],
  ["401 that wants Negotiate", { status: 401, headers: { "www-authenticate": "Negotiate" } }],
];

const NOBODYS = {
  kind: "manifest",
  where: ({ headers }) => headers.authorization === undefined,
  beforeAuth: true,
} satisfies Matcher;

const kindsOf = ({ requests }: Registry) => requests.map(({ kind }) => kind);

describe("a registry that does not ask for credentials, of which some are at hand", () => {
  for (const [name, fault] of SILENT) {
    for (const mode of ["basic", "bearer"] as const) {
      test(`${name}, ${mode}: /v2/ is asked how to show them`, async (t) => {
        const { registry, reference } = await serve(t, { mode, anonymous: "refused" });
        const rule = registry.on(NOBODYS, fault);
        const options = stored({ [registry.host]: SECRETS.password });
        assertPulled(await tryPull(t, reference, options), image);
        assert.equal(rule.hits, 1);
        const token = mode === "bearer" ? ["token" as const] : [];
        const first = ["manifest", "ping", ...token, "manifest"];
        assert.deepEqual(kindsOf(registry).slice(0, first.length), first);
        assert.equal(registry.seen({ kind: "ping" })[0]?.headers.authorization, undefined);
      });
    }

    test(`${name}, and none at hand: one request`, async (t) => {
      const { registry, reference } = await serve(t, { mode: "bearer" });
      registry.on(NOBODYS, fault);
      const { error } = await tryPull(t, reference, HTTP);
      assert.equal(error?.status, fault.status);
      assert.deepEqual(kindsOf(registry), ["manifest"]);
    });

    test(`${name}, and /v2/ does not ask either: they were not sent, and are not called refused`, async (t) => {
      const { registry, reference } = await serve(t, { mode: "none" });
      registry.on(NOBODYS, fault);
      const { error, warnings } = await tryPull(t, reference, { ...HTTP, ...GIVEN });
      assert.equal(error?.status, fault.status);
      assert.doesNotMatch(error?.message ?? "", /refused/);
      if (fault.status !== 404) assert.match(error?.message ?? "", /`username` .* were not sent/);
      assert.deepEqual(warnings, []);
      assert.deepEqual(kindsOf(registry), ["manifest", "ping"]);
      assert.deepEqual(new Set(sentTo(registry)), new Set([undefined]));
    });
  }

  test("what a storage host says is not the registry's: it is still asked, later", async (t) => {
    const { registry, reference } = await serve(t, { mode: "bearer", anonymous: "refused" });
    const environment = stored({ [registry.host]: SECRETS.password }).environment ?? {};
    registry.on({ ...NOBODYS, times: 1 }, { redirect: `${registry.storageUrl}/store/none` });
    registry.on({ ...NOBODYS, times: 1 }, { status: 404 });
    const outcome = await tryPull(t, reference, { ...HTTP, environment });
    assertPulled(outcome, image);
    const pings = registry.seen({ kind: "ping" });
    assert.deepEqual(
      pings.map(({ server }) => server),
      ["registry"],
    );
  });

  test("a tag that is not there costs one question, and is not there", async (t) => {
    const { registry, reference } = await serve(t, { mode: "none" });
    const outcome = await tryPull(t, `${reference}-gone`, { ...HTTP, ...GIVEN });
    assertFailed(outcome, "NOT_FOUND", "no such tag");
    assert.deepEqual(kindsOf(registry), ["manifest", "ping"]);
  });
});

describe("a registry that refuses a token which its token service has given for good credentials", () => {
  const refused = (registry: Registry, status: number) => {
    const challenge = `Bearer realm="${registry.tokenUrl}",error="insufficient_scope"`;
    registry.on({ kind: "manifest" }, { status, headers: { "www-authenticate": challenge } });
  };

  for (const status of [401, 403]) {
    test(`${status}: the credentials of --user are not blamed`, async (t) => {
      const { registry, reference } = await serve(t, { mode: "bearer", anonymous: "refused" });
      refused(registry, status);
      const { error } = await tryPull(t, reference, { ...HTTP, ...GIVEN });
      assert.equal(error?.status, status);
      const words =
        /credentials of `username` and `password` are right, but may not pull .*team\/app$/;
      assert.match(error?.message ?? "", words);
      assert.doesNotMatch(error?.message ?? "", /refused/);
      assert(registry.requests.length <= 5, `${registry.requests.length} requests`);
    });

    test(`${status}: nor are stored ones`, async (t) => {
      const { registry, reference } = await serve(t, { mode: "bearer" });
      refused(registry, status);
      const options = stored({ [registry.host]: SECRETS.password });
      const { error, warnings } = await tryPull(t, reference, options);
      assert.match(error?.message ?? "", /\(DOCKER_AUTH_CONFIG\) are right, but may not pull/);
      assert.match(warnings.join(), /DOCKER_AUTH_CONFIG do not open it/);
      assert.doesNotMatch(`${error?.message} ${warnings}`, /were refused/);
      assert(registry.requests.length <= 7, `${registry.requests.length} requests`);
    });
  }
});

// ====== Scopes ======

/**
 * Who refuses the token for our name of the repository: its service, or the registry that gets it.
 */
const SCOPE_REFUSALS: [name: string, fault: Fault][] = [
  ["the token service by 401", { status: 401 }],
  ["the token service by 403", { status: 403 }],
  ["the token service by 400", { status: 400 }],
  ["the registry", { body: '{"token":"of-no-use"}' }],
];

describe("a repository that the registry knows by another name", () => {
  const OURS = "repository:proxy/team/app:pull";
  const asksFor = (scope: string): Matcher => ({
    kind: "token",
    where: ({ query }) => query.get("scope") === scope,
  });

  for (const [name, fault] of SCOPE_REFUSALS) {
    for (const options of [{ ...HTTP, ...GIVEN }, HTTP]) {
      const who = "username" in options ? "with credentials" : "without";
      test(`${name} refuses ours, ${who}: theirs is asked for once, to pull only`, async (t) => {
        const auth = { mode: "bearer", scope: "repository:team/app:pull,push" } as const;
        const { registry, reference } = await serve(t, auth, { prefix: "proxy/" });
        const rule = registry.on(asksFor(OURS), fault);
        const outcome = await tryPull(t, reference, options);
        assertPulled(outcome, image);
        assert.equal(rule.hits, 1);
        const scopes = registry.tokenRequests().map(({ query }) => query.getAll("scope"));
        assert.deepEqual(scopes, [[OURS], ["repository:team/app:pull"]]);
        assert.deepEqual(outcome.warnings, []);
      });
    }
  }

  test("three images at once: each scope is asked for once", async (t) => {
    const auth = { mode: "bearer", scope: "repository:team/app:pull" } as const;
    const registry = await startRegistry({ auth, prefix: "proxy/" }, t);
    const references = ["1", "2", "3"].map((tag) =>
      registry.add(makeImage({ seed: tag }), "team/app", tag),
    );
    registry.on(asksFor(OURS), { body: '{"token":"of-no-use"}' });
    const tar = join(temporaryFolder(t), "all.tar");
    const env = { DOCKER_AUTH_CONFIG: authFile({ [registry.host]: SECRETS.password }) };
    const args = ["--scheme", "http", "--platform", "linux/amd64"];
    const { exitCode, stderr } = await runCommand([...references, tar, ...args], { env });
    assert.equal(exitCode, 0, stderr);
    assert.doesNotMatch(stderr, /credentials/);
    const scopes = registry.tokenRequests().map(({ query }) => query.get("scope"));
    assert.deepEqual(scopes, [OURS, "repository:team/app:pull"]);
  });

  test("a scope of another kind, as ECR Public's", async (t) => {
    const { registry, reference } = await serve(t, { mode: "none" });
    registry.on(asksFor("repository:team/app:pull"), { status: 400 });
    registry.on(asksFor("aws"), { body: '{"token":"good"}' });
    const challenge = `Bearer realm="${registry.tokenUrl}",scope="aws"`;
    registry.on(
      { where: ({ kind, headers }) => kind !== "token" && headers.authorization !== "Bearer good" },
      { status: 401, headers: { "www-authenticate": challenge } },
    );
    assertPulled(await tryPull(t, reference, HTTP), image);
    assert.equal(registry.tokenRequests().length, 2);
  });

  test("one that is refused as well ends the pull, and is not asked for again", async (t) => {
    const auth = { mode: "bearer", scope: "repository:secret:pull", anonymous: "refused" } as const;
    for (const options of [{ ...HTTP, ...GIVEN }, { ...HTTP, ...GIVEN, password: WRONG }, HTTP]) {
      const { registry, reference } = await serve(t, auth);
      registry.on({ kind: "token" }, { status: 401 });
      assertFailed(await tryPull(t, reference, options), "UNAUTHORIZED", "401");
      const scopes = registry.tokenRequests().map(({ query }) => query.get("scope"));
      assert.deepEqual(scopes, ["repository:team/app:pull", "repository:secret:pull"]);
    }
  });

  test("stored credentials that are wrong: each scope once with them, once without", async (t) => {
    const auth = { mode: "bearer", scope: "repository:secret:pull" } as const;
    const { registry, reference } = await serve(t, auth);
    registry.on({ kind: "token" }, { status: 401 });
    const outcome = await tryPull(t, reference, stored({ [registry.host]: WRONG }));
    assertFailed(outcome, "UNAUTHORIZED", "stored credentials (DOCKER_AUTH_CONFIG) were refused");
    assert.equal(registry.tokenRequests().length, 4);
    assert.equal(outcome.warnings.length, 1);
  });
});

test("images of one repository that are asked for at once meet one 401", async (t) => {
  for (const mode of ["basic", "bearer"] as const) {
    const registry = await startRegistry({ auth: { mode, anonymous: "refused" } }, t);
    const other = makeImage({ seed: "other" });
    const references = [
      registry.add(image, "team/app", "1.0"),
      registry.add(other, "team/app", "2.0"),
      registry.add(other, "team/app", "3.0"),
    ];
    const tar = join(temporaryFolder(t), "all.tar");
    const { exitCode, stderr } = await runCommand([...references, tar, "--scheme", "http"], {
      env: { DOCKER_AUTH_CONFIG: authFile({ [registry.host]: SECRETS.password }) },
    });
    assert.equal(exitCode, 0, stderr);
    assert.equal(registry.seen({ where: ({ status }) => status === 401 }).length, 1);
    assert.equal(registry.tokenRequests().length, mode === "bearer" ? 1 : 0);
  }
});

// ====== Renewal ======

const layered = makeImage({ seed: "layered", layers: Array.from({ length: 6 }, () => 8192) });

test("tokens that die in mid-pull are replaced, for all connections by one request", async (t) => {
  for (const staleStatus of [401, 400]) {
    const registry = await startRegistry({ auth: { mode: "bearer", staleStatus } }, t);
    // In an index the platform is told, so that nothing is asked for before all blobs are, at once.
    const reference = registry.add(makeIndex([layered]), "team/app", "1.0");
    registry.on(
      { digest: layered.digest, times: 1 },
      {
        handler: async (_request, _response, next) => {
          await next();
          registry.expireTokens();
        },
      },
    );
    const outcome = await tryPull(t, reference, HTTP);
    assertPulled(outcome, layered);
    assert.equal(registry.tokenRequests().length, 2);
    assert.deepEqual([outcome.waitsMs, outcome.warnings], [[], []]);
  }
});

test("tokens good for two requests each carry a pull to its end", async (t) => {
  const registry = await startRegistry(
    { auth: { mode: "bearer", tokenUses: 2, anonymous: "refused" } },
    t,
  );
  const outcome = await tryPull(t, registry.add(layered, "team/app", "1.0"), {
    ...HTTP,
    ...GIVEN,
    concurrency: 1,
  });
  assertPulled(outcome, layered);
  assert(registry.tokenRequests().length >= 4);
  assert.deepEqual(outcome.warnings, []);
});

test("a layer that breaks off goes on from there with a new token", async (t) => {
  const large = makeImage({ seed: "large", layers: [1_000_000] });
  const registry = await startRegistry({ auth: { mode: "bearer" } }, t);
  const rule = registry.on({ kind: "layer", times: 1 }, { dropAfter: 500_000 });
  const reference = registry.add(large, "team/app", "1.0");
  const outcome = await tryPull(t, reference, { ...HTTP, onSleep: () => registry.expireTokens() });
  assertPulled(outcome, large);
  assert.equal(rule.hits, 1);
  assert.equal(registry.tokenRequests().length, 2);
  assert(registry.bytesServed() <= 1.1 * 1_000_000);
});

test("a registry that finds every token stale ends the pull", async (t) => {
  const { registry, reference } = await serve(t, { mode: "bearer" });
  const challenge = `Bearer realm="${registry.tokenUrl}",error="invalid_token"`;
  registry.on({ kind: "layer" }, { status: 401, headers: { "www-authenticate": challenge } });
  assertFailed(await tryPull(t, reference, HTTP), "UNAUTHORIZED", "401");
  assert(registry.tokenRequests().length <= 8);
});

test("a token past its time is replaced before it is refused; none counts as older than it can be", async (t) => {
  const cases = [
    [300, 301, 2],
    [300, 200, 1],
    [5, 50, 1],
    [undefined, 61, 2],
  ] as const;
  for (const [expiresIn, laterSeconds, tokens] of cases) {
    const { registry, reference } = await serve(t, { mode: "bearer", expiresIn });
    let now = Date.UTC(2026, 0, 1);
    registry.on(
      { kind: "manifest", times: 1 },
      {
        handler: async (_request, _response, next) => {
          now += laterSeconds * 1000;
          await next();
        },
      },
    );
    assertPulled(await tryPull(t, reference, { ...HTTP, now: () => now }), image);
    assert.equal(
      registry.tokenRequests().length,
      tokens,
      `expires_in ${expiresIn}, ${laterSeconds} s later`,
    );
    assert.equal(registry.seen({ where: ({ status }) => status === 401 }).length, 1);
  }
});

// ====== What is never sent where ======

test("credentials of one registry are not sent to another", async (t) => {
  const mine = await serve(t, { mode: "basic" });
  for (const mode of ["basic", "bearer"] as const) {
    const other = await serve(t, { mode, anonymous: "refused" });
    assertFailed(
      await tryPull(t, other.reference, stored({ [mine.registry.host]: SECRETS.password })),
      "UNAUTHORIZED",
    );
    assert.deepEqual(new Set(sentTo(other.registry)), new Set([undefined]));
  }
});

test("two registries in one pull: each is sent its own", async (t) => {
  const first = await serve(t, { mode: "basic", password: "first" });
  const second = await serve(t, { mode: "bearer", anonymous: "refused", password: "second" });
  const tar = join(temporaryFolder(t), "both.tar");
  const file = authFile({ [first.registry.host]: "first", [second.registry.host]: "second" });
  const { exitCode, stderr } = await runCommand(
    [first.reference, second.reference, tar, "--scheme", "http", "--platform", "linux/amd64"],
    { env: { DOCKER_AUTH_CONFIG: file } },
  );
  assert.equal(exitCode, 0, stderr);
  assert.deepEqual(new Set(sentTo(first.registry)), new Set([undefined, basic(USER, "first")]));
  assert.deepEqual(
    new Set(sentTo(second.registry)),
    new Set([undefined, basic(USER, "second"), `Bearer ${SECRETS.bearerToken}1`]),
  );
});

test("an https registry that names a token service over http gets no token", async (t) => {
  const authority = makeAuthority();
  const auth = { mode: "bearer", tokenServer: "second-http" } as const;
  const { registry, reference } = await serve(t, auth, { tls: authority.issueServer() });
  const caCert = fileIn(temporaryFolder(t), "ca.pem", authority.cert);
  assertFailed(
    await tryPull(t, reference, { caCert, ...GIVEN }),
    "PROTOCOL",
    "token endpoint",
    "http:",
  );
  assert.equal(registry.connections("token"), 0);
});

test("a token service that redirects elsewhere takes no credentials along", async (t) => {
  const other = await serve(t, { mode: "bearer" });
  const { registry, reference } = await serve(t, { mode: "bearer", anonymous: "refused" });
  registry.on({ kind: "token" }, { redirect: (request) => `${other.registry.url}${request.url}` });
  assert((await tryPull(t, reference, { ...HTTP, ...GIVEN })).error);
  assert(other.registry.tokenRequests().length > 0);
  assert.deepEqual(new Set(sentTo(other.registry)), new Set([undefined]));
  // An identity token is the body itself: that POST is not carried anywhere.
  assert((await tryPull(t, reference, stored({ [registry.host]: IDENTITY }))).error);
  assert(
    !other.registry.tokenRequests().some(({ method, body }) => method === "POST" || body !== ""),
  );
});

const IMAGE = makeImage();

test("a stored registrytoken that fits no header is an error that names its file", async (t) => {
  const registry = await startRegistry({ auth: "bearer" }, t);
  const reference = registry.add(IMAGE, "team/app", "1.0");
  const config = JSON.stringify({ auths: { [registry.host]: { registrytoken: "abc\nx" } } });
  const outcome = await tryPull(t, reference, {
    scheme: "http",
    environment: { DOCKER_AUTH_CONFIG: config },
  });
  assertFailed(outcome, "CREDENTIALS", "DOCKER_AUTH_CONFIG");
});
