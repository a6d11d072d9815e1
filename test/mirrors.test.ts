// Section 9: a repository that is had from several places. What a mirror cannot give comes from the
// next one, with one warning for each; names, lock lines and DEST's bytes are those of the registry
// that is mirrored.
import assert from "node:assert/strict";
import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { describe, test } from "node:test";
import { ImgpullError, internals, pullImages } from "../imgpull.ts";
import { makeAuthority } from "./support/certificates.ts";
import {
  cleanEnvironment,
  runCommand,
  SECRETS,
  type TestScope,
  temporaryFolder,
  USER,
} from "./support/command.ts";
import { makeImage, makeIndex } from "./support/image.ts";
import { assertFailed, assertPulled, LINUX, type PullOptions, tryPull } from "./support/pull.ts";
import {
  type Fault,
  type Matcher,
  type Registry,
  type RegistryOptions,
  startRegistry,
} from "./support/registry.ts";

const image = makeImage({ seed: "mirrors", layers: [8192, 70_000, 8192] });
const HTTP = { scheme: "http" } as const;

/** A registry with the image, and mirrors of it below `hub`. */
async function serve(t: TestScope, options: RegistryOptions[], home: RegistryOptions = {}) {
  const registry = await startRegistry(home, t);
  const reference = registry.add(image, "team/app", "1.0");
  const mirrors = await Promise.all(
    options.map((each) => startRegistry({ prefix: "hub/", ...each }, t)),
  );
  for (const mirror of mirrors) mirror.add(image, "team/app", "1.0");
  const places = mirrors.map(({ host }) => `${host}/hub`);
  return {
    registry,
    reference,
    mirrors,
    options: { ...HTTP, mirrors: { [registry.host]: places } },
  };
}

const stored = (...entries: [host: string, password: string][]) => {
  const auths = entries.map(([host, password]) => [
    host,
    { auth: Buffer.from(`${USER}:${password}`).toString("base64") },
  ]);
  return { DOCKER_AUTH_CONFIG: JSON.stringify({ auths: Object.fromEntries(auths) }) };
};

const shownTo = (registry: Registry) =>
  new Set(registry.requests.map(({ headers }) => headers.authorization?.split(" ")[0]));

test("all comes from the mirror: below its prefix, with ?ns= of the registry, under its name", async (t) => {
  const { registry, reference, mirrors, options } = await serve(t, [{}]);
  const outcome = await tryPull(t, reference, options);
  assertPulled(outcome, image);
  assert.deepEqual(outcome.warnings, []);
  assert.equal(outcome.result?.name, reference);
  assert.equal(registry.requests.length, 0);
  for (const { path, query } of mirrors[0]?.requests ?? []) {
    assert.match(path, /^\/v2\/hub\/team\/app\/(manifests|blobs)\//);
    assert.equal(query.get("ns"), registry.host);
  }
});

test("the command: repeatable, in order, and the lock line is the registry's", async (t) => {
  const { registry, reference, mirrors } = await serve(t, [{}, {}]);
  const [first, second] = mirrors as [Registry, Registry];
  first.remove("team/app", "1.0");
  const tar = join(temporaryFolder(t), "image.tar");
  const places = mirrors.flatMap(({ url }) => ["--mirror", `${registry.host}=${url}/hub/`]);
  const platform = ["--platform", "linux/amd64", "--scheme", "http"];
  const { exitCode, stdout, stderr } = await runCommand([...places, reference, tar, ...platform]);
  assert.equal(exitCode, 0, stderr);
  assert.equal(String(stdout), `${reference}@${image.digest}\n`);
  assert.equal(first.requests.length, 1);
  assert.equal(registry.requests.length, 0);
  assert.equal(stderr.split("the mirror").length, 2, stderr);
  assert(stderr.includes(`asking ${second.host}/hub instead`), stderr);
});

test("the same bytes, wherever they come from", async (t) => {
  const { reference, options, mirrors } = await serve(t, [{}]);
  const name = "example.com/app:1";
  const withMirror = await tryPull(t, reference, { ...options, name });
  const without = await tryPull(t, reference, { ...HTTP, name });
  assert(readFileSync(withMirror.tar).equals(readFileSync(without.tar)));
  assert(mirrors[0] && mirrors[0].requests.length > 0);
});

// ====== What a mirror cannot give ======

type Failing = [name: string, matcher: Matcher, fault: Fault, words: RegExp, most: number];

/** `most` is how many requests may go to the mirror in all. */
const FAILING: Failing[] = [
  ["has not the image", { kind: "manifest" }, { status: 404 }, /no such tag/, 1],
  ["refuses the image", { kind: "manifest" }, { status: 403 }, /403/, 1],
  ["wants credentials", { kind: "manifest" }, { status: 401 }, /401/, 1],
  ["is out of order", { kind: "manifest" }, { status: 503 }, /503/, 1],
  [
    "asks to come back",
    { kind: "manifest" },
    { status: 429, headers: { "retry-after": "600" } },
    /429/,
    1,
  ],
  ["resets", { kind: "manifest" }, { reset: true }, /connection lost/, 1],
  [
    "has a web page",
    { kind: "manifest" },
    { body: "<html>", headers: { "content-type": "text/html" } },
    /not a manifest/,
    1,
  ],
  [
    "has JSON that is no manifest",
    { kind: "manifest" },
    { body: '{"login":"first"}', headers: { "content-type": "application/json" } },
    /not a manifest/,
    1,
  ],
  [
    "has an empty manifest",
    { kind: "manifest" },
    { body: `{"schemaVersion":2,"mediaType":"${image.mediaType}"}` },
    /no manifest/,
    1,
  ],
  [
    "has manifests of the first schema",
    { kind: "manifest" },
    { body: '{"schemaVersion":1,"fsLayers":[]}' },
    /schema 1/,
    1,
  ],
  ["cuts manifests off", { kind: "manifest" }, { dropAfter: 10 }, /manifests/, 3],
  ["lies about a config", { kind: "config" }, { corruptAt: 5 }, /digest/, 2],
  ["has no config", { kind: "config" }, { status: 404 }, /no such blob/, 5],
  ["lies about layers", { kind: "layer" }, { corruptAt: 5 }, /digest/, 5],
  ["has no layers", { kind: "layer" }, { status: 404 }, /no such blob/, 5],
  ["refuses layers", { kind: "layer" }, { status: 403 }, /403/, 5],
  [
    "asks to come back for layers",
    { kind: "layer" },
    { status: 429, headers: { "retry-after": "600" } },
    /429/,
    8,
  ],
  ["is out of order at layers", { kind: "layer" }, { status: 500 }, /500/, 8],
  ["cuts layers off", { kind: "layer" }, { dropAfter: 100 }, /ended after/, 8],
  ["resets at layers", { kind: "layer" }, { reset: true }, /connection lost/, 8],
  [
    "has pages for layers",
    { kind: "layer" },
    { body: "<html>", headers: { "content-type": "text/html" } },
    /blobs/,
    5,
  ],
  [
    "sends more than there is",
    { kind: "layer" },
    { body: Buffer.alloc(90_000), headers: { "content-length": null } },
    /./,
    5,
  ],
  [
    "says it is compressed",
    { kind: "layer" },
    {
      body: Buffer.alloc(9000, 7),
      headers: { "content-encoding": "gzip", "content-length": null },
    },
    /./,
    8,
  ],
];

describe("a mirror that", () => {
  for (const [name, matcher, fault, words, most] of FAILING) {
    test(`${name}: one warning, and the next place`, async (t) => {
      for (const retries of [0, 5]) {
        const { registry, reference, mirrors, options } = await serve(t, [{}]);
        const rule = mirrors[0]?.on(matcher, fault);
        const outcome = await tryPull(t, reference, { ...options, retries });
        assertPulled(outcome, image);
        assert((rule?.hits ?? 0) > 0);
        const told = outcome.warnings.filter((warning) => warning.startsWith("the mirror "));
        assert.equal(told.length, 1, outcome.warnings.join("\n"));
        assert.match(told[0] ?? "", words);
        assert.match(told[0] ?? "", new RegExp(`asking ${registry.host} instead$`));
        const asked = mirrors[0]?.requests.length ?? 0;
        assert(asked <= most, `${asked} requests to the mirror`);
        if (retries === 0) assert.deepEqual(outcome.waitsMs, []);
      }
    });
  }

  test("is dead: one warning, and the next place", async (t) => {
    const { registry, reference, mirrors, options } = await serve(t, [{}, {}]);
    await mirrors[0]?.close();
    const outcome = await tryPull(t, reference, options);
    assertPulled(outcome, image);
    assert.equal(outcome.warnings.length, 1);
    assert.match(outcome.warnings[0] ?? "", /connection refused; asking .*\/hub instead/);
    assert.equal(registry.requests.length, 0);
    assert.deepEqual(outcome.waitsMs, []);
  });

  test("has a part of an index: the rest comes from the registry, to the byte", async (t) => {
    const index = makeIndex([image, makeImage({ seed: "arm", platform: "linux/arm64" })]);
    const { registry, reference, mirrors, options } = await serve(t, [{}]);
    registry.add(index, "team/app", "1.0");
    mirrors[0]?.add(index, "team/app", "1.0", { without: [image.digest] });
    const outcome = await tryPull(t, reference, options);
    assertPulled(outcome, image);
    assert.deepEqual(
      registry.requests.map(({ kind }) => kind),
      ["manifest"],
    );
    assert.equal(outcome.warnings.length, 1);
  });

  test("breaks off once, as any registry may: it is asked again, and goes on from there", async (t) => {
    const { registry, reference, mirrors, options } = await serve(t, [{}]);
    const rule = mirrors[0]?.on({ kind: "layer", times: 1 }, { dropAfter: 5000 });
    const outcome = await tryPull(t, reference, options);
    assertPulled(outcome, image);
    assert.equal(rule?.hits, 1);
    assert.equal(registry.requests.length, 0);
    assert.doesNotMatch(outcome.warnings.join("\n"), /instead/);
  });

  test("lies, before a registry that lies once: what is right is found", async (t) => {
    const { registry, reference, mirrors, options } = await serve(t, [{}]);
    mirrors[0]?.on({ kind: "layer" }, { corruptAt: 5 });
    const rule = registry.on({ kind: "layer", times: 1 }, { corruptAt: 5 });
    assertPulled(await tryPull(t, reference, options), image);
    assert.equal(rule.hits, 1);
  });

  test("fails now and then, one after the other: no attempts are left to run out", async (t) => {
    const { reference, mirrors, options } = await serve(t, [{}, {}, {}]);
    for (const mirror of mirrors) mirror.on({ kind: "layer" }, { dropAfter: 100 });
    for (const retries of [0, 1, 2, 5])
      assertPulled(await tryPull(t, reference, { ...options, concurrency: 1, retries }), image);
  });

  test("fails before a registry that fails: the error is the registry's", async (t) => {
    const { registry, reference, mirrors, options } = await serve(t, [{}]);
    mirrors[0]?.on({ kind: "manifest" }, { status: 404 });
    registry.on({ kind: "manifest" }, { status: 403 });
    const outcome = await tryPull(t, reference, options);
    assertFailed(outcome, "FORBIDDEN", registry.host, "403");
    assert.equal(outcome.warnings.length, 1);
  });

  test("takes no ranges is asked for the whole", async (t) => {
    const { registry, reference, mirrors, options } = await serve(t, [{}]);
    mirrors[0]?.on({ kind: "layer", ranged: true }, { status: 403 });
    assertPulled(await tryPull(t, reference, options), image);
    assert.equal(registry.requests.length, 0);
  });
});

// ====== Many repositories ======

describe("twenty repositories of one registry behind a mirror that", () => {
  const names = Array.from({ length: 20 }, (_, at) => `team/app${at}`);

  /** One tar of all of them, by the command. */
  async function pullMany(t: TestScope, prepare: (mirror: Registry) => unknown) {
    const registry = await startRegistry({}, t);
    const mirror = await startRegistry({ prefix: "hub/" }, t);
    const references = names.map((name) => {
      mirror.add(image, name, "1.0");
      return registry.add(image, name, "1.0");
    });
    await prepare(mirror);
    const tar = join(temporaryFolder(t), "all.tar");
    const options = ["--scheme", "http", "--platform", "linux/amd64", "-j", "4"];
    const place = ["--mirror", `${registry.host}=${mirror.host}/hub`];
    const { exitCode, stderr } = await runCommand([...references, tar, ...options, ...place]);
    assert.equal(exitCode, 0, stderr);
    return { mirror, told: stderr.match(/; asking .* instead$/gm)?.length ?? 0 };
  }

  test("serves them all", async (t) => {
    const { told } = await pullMany(t, () => {});
    assert.equal(told, 0);
  });

  test("has none of them: each is asked for once, and one warning", async (t) => {
    const { mirror, told } = await pullMany(t, (each) => each.on({}, { status: 404 }));
    assert.deepEqual([mirror.requests.length, told], [names.length, 1]);
  });

  for (const [name, fault] of [
    ["hangs up", { reset: true }],
    ["wants no more requests", { status: 429, headers: { "retry-after": "999" } }],
  ] as const) {
    test(`${name}: no more are asked for than were under way, and one warning`, async (t) => {
      const { mirror, told } = await pullMany(t, (each) => each.on({}, fault));
      assert(mirror.requests.length <= 4, `${mirror.requests.length} requests`);
      assert.equal(told, 1);
    });
  }

  test("lies: it is not believed for another one", async (t) => {
    const { mirror, told } = await pullMany(t, (each) =>
      each.on({ kind: "config" }, { corruptAt: 3 }),
    );
    assert(mirror.seen({ kind: "config" }).length <= 4);
    assert.equal(mirror.seen({ kind: "layer" }).length, 0);
    assert.equal(told, 1);
  });
});

// ====== What the registry itself lacks ======

/** The mirror loses three connections for layers: it is passed over from then on. */
async function serveLost(t: TestScope, times = 3) {
  const served = await serve(t, [{}]);
  const mirror = served.mirrors[0] as Registry;
  const rule = mirror.on({ kind: "layer", times }, { dropAfter: 100 });
  return { ...served, mirror, rule, options: { ...served.options, concurrency: 1 } };
}

describe("a mirror that was passed over for lost connections is asked again", () => {
  const lacking: [name: string, fault: Fault][] = [
    ["has not", { status: 404 }],
    ["denies", { status: 403 }],
    ["cannot give", { status: 500 }],
  ];
  for (const [name, fault] of lacking) {
    test(`for layers that the registry ${name}`, async (t) => {
      const { registry, reference, rule, options } = await serveLost(t);
      registry.on({ kind: "layer" }, fault);
      assertPulled(await tryPull(t, reference, options), image);
      assert.equal(rule.hits, 3);
      assert(registry.seen({ kind: "layer" }).length > 0);
    });
  }

  test("for a manifest and a config below an index, too", async (t) => {
    const index = makeIndex([image]);
    const { registry, mirrors, options } = await serve(t, [{}]);
    const mirror = mirrors[0] as Registry;
    mirror.add(index, "team/app", "2.0");
    const reference = `${registry.host}/team/app:2.0`;
    const rule = mirror.on({ digest: image.digest, times: 3 }, { dropAfter: 100 });
    registry.on({ digest: image.digest }, { status: 404 });
    assertPulled(await tryPull(t, reference, options), image);
    assert.equal(rule.hits, 3);
  });

  test("for other repositories, too", async (t) => {
    const { registry, reference, mirror, options } = await serveLost(t, 1);
    const other = makeImage({ seed: "other repository", layers: [8192, 8192] });
    mirror.add(other, "team/other", "1.0");
    registry.on({}, { status: 404 });
    const references = [reference, `${registry.host}/team/other:1.0`];
    const tar = join(temporaryFolder(t), "image.tar");
    const warnings: string[] = [];
    const onWarning = (message: string) => warnings.push(message);
    const settings = {
      ...LINUX,
      ...options,
      environment: cleanEnvironment(),
      retries: 0,
      onWarning,
    };
    const { images } = await pullImages(references, tar, settings);
    assert.equal(images.length, 2);
    assert.match(warnings.join(), /the mirror .* asking .* instead/);
  });

  test("as often as attempts are left, and then its failure is told", async (t) => {
    const { registry, reference, rule, options } = await serveLost(t, 1000);
    registry.on({ kind: "layer" }, { status: 404 });
    const outcome = await tryPull(t, reference, { ...options, retries: 5 });
    assertFailed(outcome, "NETWORK", /ended after \d+00 of/);
    assert(rule.hits <= 8, `${rule.hits} requests`);
  });

  test("but not one that has nothing either, or lies", async (t) => {
    for (const fault of [{ status: 404 }, { corruptAt: 5 }]) {
      const { registry, reference, mirrors, options } = await serve(t, [{}]);
      const rule = mirrors[0]?.on({ kind: "layer" }, fault);
      registry.on({ kind: "layer" }, { status: 404 });
      const outcome = await tryPull(t, reference, { ...options, concurrency: 1 });
      assertFailed(outcome, "NOT_FOUND", "no such blob");
      assert.equal(rule?.hits, 1);
    }
  });
});

// ====== What is shown to whom ======

test("each place gets the credentials that belong to it, and no other", async (t) => {
  for (const mode of ["basic", "bearer"] as const) {
    const auth = (password: string) => ({
      auth: { mode, password, anonymous: "refused" as const },
    });
    const { registry, reference, mirrors, options } = await serve(
      t,
      [auth("first"), auth("second")],
      auth("home"),
    );
    const [first, second] = mirrors as [Registry, Registry];
    first.on({ kind: "layer" }, { status: 404 });
    second.on({ kind: "layer" }, { status: 404 });
    const environment = stored(
      [first.host, "first"],
      [second.host, "second"],
      [registry.host, "home"],
    );
    assertPulled(await tryPull(t, reference, { ...options, environment }), image);
    const passwords = new Map([
      [first, "first"],
      [second, "second"],
      [registry, "home"],
    ]);
    for (const [place, password] of passwords) {
      const basic = `Basic ${Buffer.from(`${USER}:${password}`).toString("base64")}`;
      const shown = place.requests.map(({ headers }) => headers.authorization);
      assert(shown.includes(basic), `${mode}: ${password} was asked for`);
      for (const header of shown) {
        const isItsOwn = header === undefined || header === basic || header.startsWith("Bearer ");
        assert(isItsOwn, `${mode}: ${password} was shown ${header}`);
      }
    }
  }
});

test("--user and --token are the registry's: a mirror that wants some is passed over", async (t) => {
  const given: PullOptions[] = [
    { username: USER, password: SECRETS.password },
    { token: SECRETS.outsideToken },
  ];
  for (const credentials of given) {
    const mode = { mode: "basic", outsideToken: SECRETS.outsideToken } as const;
    const { registry, reference, mirrors, options } = await serve(t, [{ auth: mode }], {
      auth: mode,
    });
    const outcome = await tryPull(t, reference, { ...options, ...credentials });
    assertPulled(outcome, image);
    assert.deepEqual(shownTo(mirrors[0] as Registry), new Set([undefined]));
    assert(shownTo(registry).has("Basic"));
    assert.match(outcome.warnings.join(), /no credentials were found|401/);
  }
});

test("a client certificate is the registry's", async (t) => {
  const authority = makeAuthority();
  const folder = temporaryFolder(t);
  const client = authority.issueClient();
  const [caCert, tlsCert, tlsKey] = ["ca.pem", "cert.pem", "key.pem"].map((name) =>
    join(folder, name),
  ) as [string, string, string];
  writeFileSync(caCert, authority.cert);
  writeFileSync(tlsCert, client.cert);
  writeFileSync(tlsKey, client.key);
  const tls = { ...authority.issueServer(), clientCa: authority.cert };
  const { registry, reference, mirrors, options } = await serve(
    t,
    [{ tls: { ...tls, clientOptional: true } }],
    { tls },
  );
  mirrors[0]?.on({ kind: "layer" }, { status: 404 });
  const tlsOptions = { scheme: "https", caCert, tlsCert, tlsKey } as const;
  assertPulled(await tryPull(t, reference, { ...options, ...tlsOptions }), image);
  const shown = (place?: Registry) =>
    new Set(place?.requests.map((each) => each.clientCertificate));
  assert.deepEqual(shown(mirrors[0]), new Set([undefined]));
  assert(!shown(registry).has(undefined));
});

test("a mirror over http before a registry over https, and the other way round", async (t) => {
  const authority = makeAuthority();
  const caCert = join(temporaryFolder(t), "ca.pem");
  writeFileSync(caCert, authority.cert);
  for (const [mirrorTls, homeTls] of [
    [undefined, authority.issueServer()],
    [authority.issueServer(), undefined],
  ]) {
    const { registry, reference, mirrors } = await serve(
      t,
      [mirrorTls ? { tls: mirrorTls } : {}],
      homeTls ? { tls: homeTls } : {},
    );
    mirrors[0]?.on({ kind: "layer" }, { status: 404 });
    const options = {
      caCert,
      scheme: homeTls ? "https" : "http",
      mirrors: { [registry.host]: [`${mirrors[0]?.url}/hub`] },
    } as const;
    assertPulled(await tryPull(t, reference, options), image);
    assert(registry.requests.length > 0);
  }
});

// ====== Words ======

test("HOST in any of its spellings; other hosts have no mirror", async (t) => {
  const mirror = await startRegistry({ prefix: "hub/" }, t);
  mirror.add(image, "library/busybox", "1");
  for (const host of ["docker.io", "index.docker.io", "Docker.IO"]) {
    mirror.forget();
    const mirrors = { [host]: [`${mirror.host}/hub`], "quay.io": ["127.0.0.1:1"] };
    const outcome = await tryPull(t, "busybox:1", { ...HTTP, mirrors });
    assertPulled(outcome, image);
    assert.equal(outcome.result?.name, "docker.io/library/busybox:1");
    assert.equal(mirror.requests[0]?.path, "/v2/hub/library/busybox/manifests/1");
    assert.equal(mirror.requests[0]?.query.get("ns"), "docker.io");
  }
});

test("what is no HOST=PLACE is refused before any request, without its password", async () => {
  const bad: string[] = ["docker.io", "=x", "docker.io=", "docker.io=UPPER/Prefix", "a b=c"];
  bad.push("docker.io=ftp://x", "docker.io=mirror/../x", `docker.io=u:${SECRETS.password}@m`);
  for (const mirror of bad) {
    const { exitCode, stderr } = await runCommand(["--mirror", mirror, "busybox", "x.tar"]);
    assert.equal(exitCode, 2, `${mirror}: ${stderr}`);
    assert.match(stderr, /--mirror/);
  }
  const refused: Record<string, string[]>[] = [{ "a b": ["m"] }, { "docker.io": ["m/UP"] }];
  for (const mirrors of refused)
    await assert.rejects(
      internals.withSession({ mirrors }, async () => {}),
      (error) => error instanceof ImgpullError && error.code === "BAD_OPTION",
    );
});

test("an image that no place has", async (t) => {
  const { reference, options } = await serve(t, [{}, {}]);
  const outcome = await tryPull(t, `${reference}-gone`, options);
  assertFailed(outcome, "NOT_FOUND", `no such tag: ${reference}-gone`);
  assert.equal(outcome.warnings.length, 2);
});
