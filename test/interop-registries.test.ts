// Registries and token services that nobody here wrote: Docker's token service with real Bearer and
// identity tokens before docker-registry; distribution's third version, which redirects to a
// storage nginx or mirrors another registry.
import assert from "node:assert/strict";
import { existsSync, mkdirSync, readFileSync, statSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { after, before, describe, test } from "node:test";
import { setTimeout as pause } from "node:timers/promises";
import { makeAuthority } from "./support/certificates.ts";
import { runCommand, SECRETS, startCommand, USER } from "./support/command.ts";
import { makeImage, makeMultiPlatform, readTar, type TestContent } from "./support/image.ts";
import {
  type Account,
  interopFolder,
  type Nginx,
  pushImage,
  type RealRegistry,
  type Service,
  skipWithout,
  startNginx,
  startRealRegistry,
  startTokenServer,
  type TokenServer,
} from "./support/interop.ts";

const skip = skipWithout(
  "docker-registry",
  "htpasswd",
  "nginx",
  "registry",
  "skopeo",
  "token-server",
);

const image = makeImage({ seed: "registries", layers: [8192, 300_000, 40_000] });
const account: Account = { user: USER, password: SECRETS.password };
const SERVICE = "imgpull-tests";

type Entry = Account | { identitytoken: string };

/** DOCKER_AUTH_CONFIG as `docker login` leaves it. */
function stored(entries: Record<string, Entry>): Record<string, string> {
  const encode = (entry: Entry) =>
    "identitytoken" in entry
      ? entry
      : { auth: Buffer.from(`${entry.user}:${entry.password}`).toString("base64") };
  const auths = Object.entries(entries).map(([host, entry]) => [host, encode(entry)]);
  return { DOCKER_AUTH_CONFIG: JSON.stringify({ auths: Object.fromEntries(auths) }) };
}

async function pull(
  reference: string,
  options: { args?: string[]; env?: Record<string, string> } = {},
) {
  const tar = join(interopFolder("pull"), "image.tar");
  const args = ["--scheme", "http", "--platform", "linux/amd64", ...(options.args ?? [])];
  const result = await runCommand([reference, tar, ...args], { env: options.env ?? {} });
  return { ...result, tar };
}

function assertHolds(
  { exitCode, stderr, tar }: Awaited<ReturnType<typeof pull>>,
  content: TestContent,
): void {
  assert.equal(exitCode, 0, stderr);
  const bytes = readFileSync(tar);
  const entries = new Map(readTar(bytes).map((entry) => [entry.name, entry]));
  for (const [digest, blob] of content.blobs) {
    const { offset = 0, size = 0 } = entries.get(`blobs/${digest.replace(":", "/")}`) ?? {};
    assert(bytes.subarray(offset, offset + size).equals(blob), digest);
  }
}

const giveUser = ["--user", USER, "--password", SECRETS.password];

// ====== Docker's token service ======

describe("docker-registry behind Docker's token service", { skip, timeout: 300_000 }, () => {
  let tokens: TokenServer;
  let registry: RealRegistry;
  let identityToken: string;
  const own = () => `${registry.host}/${USER}/app:1.0`; // the service gives a user what is below the user's name
  const others = () => `${registry.host}/others/app:1.0`;

  before(async () => {
    const authority = makeAuthority();
    const folder = interopFolder("tokens");
    const bundle = join(folder, "bundle.pem");
    writeFileSync(bundle, authority.cert);
    tokens = await startTokenServer(account, authority);
    const storage = join(folder, "storage");
    const filling = await startRealRegistry({ storage });
    for (const place of [`${USER}/app:1.0`, `${USER}/app:2.0`, "others/app:1.0"])
      await pushImage(image, `${filling.host}/${place}`);
    await filling.stop();
    const token = {
      realm: tokens.realm,
      service: SERVICE,
      issuer: "imgpull tests",
      rootcertbundle: bundle,
    };
    registry = await startRealRegistry({ storage, configuration: { auth: { token } } });
    identityToken = await tokens.identityToken(account, SERVICE);
  });
  after(() => stopAll(registry, tokens));

  /** What was asked of the service meanwhile. */
  async function counting<T>(run: () => Promise<T>) {
    const before = tokens.asked();
    const outcome = await run();
    const { get, post } = tokens.asked();
    return { outcome, get: get - before.get, post: post - before.post };
  }

  test("a user's name and password: one token for the whole pull", async () => {
    const { outcome, get, post } = await counting(() => pull(own(), { args: giveUser }));
    assertHolds(outcome, image);
    assert.deepEqual([get, post], [1, 0]);
  });

  test("stored ones, under a key that docker writes", async () => {
    const env = stored({ [`https://${registry.host}/v2/`]: account });
    const { outcome, get, post } = await counting(() => pull(own(), { env }));
    assertHolds(outcome, image);
    assert.deepEqual([get, post], [1, 0]);
  });

  test("an identity token, by OAuth2", async () => {
    const env = stored({ [registry.host]: { identitytoken: identityToken } });
    const { outcome, get, post } = await counting(() => pull(own(), { env }));
    assertHolds(outcome, image);
    assert.deepEqual([get, post], [0, 1]);
    assert.doesNotMatch(outcome.stderr, /refused/);
  });

  test("two images of it: one token", async () => {
    const args = ["--from", "-", ...giveUser];
    const tar = join(interopFolder("pull"), "images.tar");
    const { outcome, get } = await counting(() =>
      runCommand([...args, "--scheme", "http", "--platform", "linux/amd64", tar], {
        stdin: `${own()}\n${own().replace("1.0", "2.0")}\n`,
      }),
    );
    assert.equal(outcome.exitCode, 0, outcome.stderr);
    assert.equal(get, 1);
  });

  const REFUSED: [name: string, entry: Entry, words: RegExp, most: number][] = [
    ["a wrong password", { user: USER, password: "wrong" }, /were refused, and so was/, 2],
    [
      "an identity token that is not one",
      { identitytoken: "revoked" },
      /were refused, and so was/,
      3,
    ],
  ];
  for (const [name, entry, words, most] of REFUSED) {
    test(`${name}: said with its source, and asked no more than that takes`, async () => {
      const env = stored({ [registry.host]: entry });
      const { outcome, get, post } = await counting(() => pull(own(), { env }));
      assert.equal(outcome.exitCode, 1);
      assert.match(outcome.stderr, words);
      assert.match(outcome.stderr, /DOCKER_AUTH_CONFIG/);
      assert(get + post <= most, `${get} GET and ${post} POST`);
    });
  }

  test("--user with a wrong password: nobody anonymous is asked for", async () => {
    const args = ["--user", USER, "--password", "wrong"];
    const { outcome, get } = await counting(() => pull(own(), { args }));
    assert.equal(outcome.exitCode, 1);
    assert.match(outcome.stderr, /refused: the credentials of --user/);
    assert.equal(get, 1);
  });

  test("a repository that these credentials may not pull: they are not called refused", async () => {
    const { outcome, get } = await counting(() => pull(others(), { args: giveUser }));
    assert.equal(outcome.exitCode, 1);
    assert.match(outcome.stderr, /--user and --password are right, but may not pull .*others\/app/);
    assert(get <= 2, `${get} tokens`);
  });
});

// ====== Distribution's third version ======

async function stopAll(...services: (Service | undefined)[]): Promise<void> {
  for (const service of services) await service?.stop();
}

describe("distribution 3 that redirects to its storage", { skip, timeout: 300_000 }, () => {
  let registry: RealRegistry;
  let storage: Nginx;
  const index = makeMultiPlatform(["linux/amd64", "linux/arm64"], {
    seed: "redirects",
    layers: [6_000_000, 9000],
  });
  const content = () => index.children[0] as TestContent;

  before(async () => {
    const folder = join(interopFolder("storage"), "storage");
    mkdirSync(folder);
    const filling = await startRealRegistry({ storage: folder });
    const child = content();
    await pushImage(child, `${filling.host}/team/app:1.0`);
    await filling.stop();
    storage = await startNginx({
      upstream: "http://127.0.0.1:9",
      locations: `location /docker/ { root ${folder}; default_type application/octet-stream; limit_rate 2m; }`,
    });
    const redirect = { name: "redirect", options: { baseurl: `http://${storage.host}` } };
    registry = await startRealRegistry({
      program: "registry",
      storage: folder,
      htpasswd: account,
      configuration: { middleware: { storage: [redirect] } },
    });
  });
  after(() => stopAll(registry, storage));

  test("every blob comes from there, without the registry's credentials", async () => {
    const outcome = await pull(`${registry.host}/team/app:1.0`, { args: giveUser });
    assertHolds(outcome, content());
    const requests = storage.requests();
    assert(requests.length >= content().blobs.size);
    assert.deepEqual(
      requests.filter(({ isAuthorized }) => isAuthorized),
      [],
    );
  });

  test("a pull that was stopped goes on from the byte, by new redirects", async () => {
    const tar = join(interopFolder("resume"), "image.tar");
    const args = [`${registry.host}/team/app:1.0`, tar, "--scheme", "http", ...giveUser];
    const { child, result } = startCommand([...args, "--platform", "linux/amd64", "-q"]);
    const hasCome = () => existsSync(`${tar}.partial`) && statSync(`${tar}.partial`).blocks > 2048;
    while (child.exitCode === null && !hasCome()) await pause(20);
    child.kill("SIGINT");
    assert.equal((await result).exitCode, 130);

    const before = storage.requests().length;
    const second = await runCommand([...args, "--platform", "linux/amd64"]);
    assertHolds({ ...second, tar }, content());
    const again = storage.requests().slice(before);
    assert(again.length > 0);
    const fetchedBytes = again.reduce((sum, { bytes }) => sum + bytes, 0);
    assert(fetchedBytes < 5_500_000, `${fetchedBytes} bytes came once more`);
  });
});

// ====== Mirrors ======

describe("mirrors before docker-registry", { skip, timeout: 300_000 }, () => {
  const passwords = { liar: "of-the-liar", cache: "of-the-cache", home: SECRETS.password };
  const accountOf = (password: string): Account => ({ user: USER, password });
  let home: RealRegistry;
  let cache: RealRegistry; // distribution 3 in proxy mode
  let cacheDoor: Nginx; // which asks for its password
  let liar: Nginx; // has the manifests, and other bytes for all blobs
  let dead: string;

  before(async () => {
    const storage = join(interopFolder("home"), "storage");
    const filling = await startRealRegistry({ storage });
    await pushImage(image, `${filling.host}/team/app:1.0`);
    await filling.stop();
    dead = filling.host;
    home = await startRealRegistry({ storage, htpasswd: accountOf(passwords.home) });
    const proxy = {
      remoteurl: `http://${home.host}`,
      username: USER,
      password: passwords.home,
    };
    cache = await startRealRegistry({ program: "registry", configuration: { proxy } });
    cacheDoor = await startNginx({
      upstream: `http://127.0.0.1:${cache.port}`,
      htpasswd: accountOf(passwords.cache),
    });

    const lies = interopFolder("lies");
    mkdirSync(join(lies, "v2/team/app/blobs"), { recursive: true });
    for (const [digest, bytes] of image.blobs)
      writeFileSync(join(lies, "v2/team/app/blobs", digest), Buffer.alloc(bytes.length, 7));
    liar = await startNginx({
      upstream: `http://127.0.0.1:${cache.port}`,
      htpasswd: accountOf(passwords.liar),
      locations: `location ~ /blobs/ { root ${lies}; }`,
    });
  });
  after(() => stopAll(liar, cacheDoor, cache, home));

  const mirrorsOf = (...places: string[]) =>
    places.flatMap((place) => ["--mirror", `${home.host}=${place}`]);
  const known = () =>
    stored({
      [liar.host]: accountOf(passwords.liar),
      [cacheDoor.host]: accountOf(passwords.cache),
      [home.host]: accountOf(passwords.home),
    });

  test("one is dead, one lies, one is a cache: each warned of once, and the registry is not needed", async () => {
    await home.takeServed();
    const lied = liar.requests().length;
    const args = mirrorsOf(dead, `http://${liar.host}`, cacheDoor.host);
    const outcome = await pull(`${home.host}/team/app:1.0`, { args, env: known() });
    assertHolds(outcome, image);
    assert.equal(String(outcome.stdout), `${home.host}/team/app:1.0@${image.digest}\n`);
    const told = outcome.stderr.split("\n").filter((line) => line.includes("the mirror "));
    assert.equal(told.length, 2, outcome.stderr);
    assert.match(told[0] ?? "", /connection refused; asking .* instead/);
    assert.match(told[1] ?? "", /digest .*; asking .* instead/);
    assert(liar.requests().length - lied <= 3 + image.blobs.size, "the liar was asked too often");
    assert(
      cacheDoor
        .requests()
        .some(({ path, isAuthorized }) => isAuthorized && path.includes("/blobs/")),
    );
  });

  test("the cache alone, then without the registry behind it", async () => {
    const args = mirrorsOf(cacheDoor.host);
    const reference = `${home.host}/team/app@${image.digest}`;
    assertHolds(await pull(reference, { args, env: known() }), image);
    const { port } = home;
    await home.stop();
    try {
      assertHolds(await pull(reference, { args, env: known() }), image);
    } finally {
      await home.start();
    }
    assert.equal(home.port, port);
  });

  test("all of them gone: the registry gives it, with its own credentials", async () => {
    await home.takeServed();
    const args = mirrorsOf(dead, `${cacheDoor.host}/no/such/prefix`);
    const outcome = await pull(`${home.host}/team/app:1.0`, { args, env: known() });
    assertHolds(outcome, image);
    const served = (await home.takeServed()).filter(({ status }) => status === 200);
    assert.deepEqual(new Set(served.map(({ digest }) => digest)), new Set(image.blobs.keys()));
    assert.equal(outcome.stderr.split("the mirror ").length, 3, outcome.stderr);
  });

  test("a mirror that is shown no credentials is passed over", async () => {
    const args = mirrorsOf(cacheDoor.host);
    const env = stored({ [home.host]: accountOf(passwords.home) });
    const outcome = await pull(`${home.host}/team/app:1.0`, { args, env });
    assertHolds(outcome, image);
    assert.match(outcome.stderr, /the mirror .*401/);
  });
});
