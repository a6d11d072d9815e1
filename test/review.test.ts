// Faults that a review found, each first as a test that failed: odd peers, odd input, runs beside each other.
import assert from "node:assert/strict";
import {
  mkdirSync,
  readFileSync,
  readlinkSync,
  rmdirSync,
  symlinkSync,
  writeFileSync,
} from "node:fs";
import { createServer } from "node:net";
import { join } from "node:path";
import { test } from "node:test";
import { internals, Puller } from "../imgpull.ts";
import { makeAuthority } from "./support/certificates.ts";
import { COMMAND, runCommand, SECRETS, secretForms, temporaryFolder } from "./support/command.ts";
import { makeImage } from "./support/image.ts";
import { assertFailed, tryPull } from "./support/pull.ts";
import { gate, startRegistry } from "./support/registry.ts";

const image = makeImage();
const REFERENCE = "team/app";
const AMD64 = ["--scheme", "http", "--platform", "linux/amd64", "-q"];

test("a 101 that nobody asked for is a failure with words, not an end without any", async (t) => {
  const server = createServer((socket) => {
    socket.on("error", () => undefined);
    socket.once("data", () =>
      socket.end("HTTP/1.1 101 X\r\nConnection: upgrade\r\nUpgrade: h2c\r\n\r\n"),
    );
  });
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  t.after(() => server.close());
  const { port } = server.address() as { port: number };
  const args = [
    `127.0.0.1:${port}/app:1`,
    join(temporaryFolder(t), "a.tar"),
    ...AMD64,
    "--retries",
    "0",
  ];
  const { exitCode, stderr } = await runCommand(args);
  assert.equal(exitCode, 1);
  assert.match(stderr, /closed without an answer/);
});

test("the client certificate is not shown to the token service of a redirect's target", async (t) => {
  const authority = makeAuthority();
  const server = authority.issueServer();
  const client = authority.issueClient({ commonName: "client" });
  const registry = await startRegistry({ tls: { ...server, clientCa: authority.cert } }, t);
  const other = await startRegistry(
    { tls: { ...server, clientCa: authority.cert, clientOptional: true }, auth: "bearer" },
    t,
  );
  const folder = temporaryFolder(t);
  const file = (name: string, text: string) => {
    writeFileSync(join(folder, name), text);
    return join(folder, name);
  };
  const caCert = file("ca.pem", authority.cert);
  const [tlsCert, tlsKey] = [file("cert.pem", client.cert), file("key.pem", client.key)];
  const reference = registry.add(image, REFERENCE, "1.0");
  other.add(image, REFERENCE, "1.0");
  registry.on({ kind: "manifest" }, { redirect: (record) => new URL(record.path, other.url).href });
  await tryPull(t, reference, { scheme: "https", caCert, tlsCert, tlsKey, retries: 0 });
  const shown = [registry, other].map(({ requests }) =>
    requests.map(({ clientCertificate }) => clientCertificate),
  );
  assert.ok(other.requests.length > 0, "the redirect was followed");
  assert.ok(shown[0]?.includes("client"), "the registry itself was shown it");
  assert.ok(!shown[1]?.includes("client"), "the target was not");
});

for (const host of ["10.0.0.256:5000", "1.2.3.4.5"]) {
  test(`a host that no URL takes is a bad reference: ${host}`, async (t) => {
    const { exitCode, stderr } = await runCommand([
      `${host}/app:1`,
      join(temporaryFolder(t), "a.tar"),
    ]);
    assert.equal(exitCode, 2);
    assert.match(stderr, /^imgpull: bad image reference .* is not a host[^\n]*\n$/);
  });
}

test("a path's first part that cannot be a host is no mirror's name", () => {
  const reference = internals.parseReference("registry.example.com/my_team.app/service:1");
  assert.equal(
    internals.formatReference(internals.imageName(reference)),
    "registry.example.com/my_team.app/service:1",
  );
});

for (const option of ["--reuse", "--since"]) {
  test(`${option} with a folder is an error in words`, async (t) => {
    const folder = temporaryFolder(t);
    const { exitCode, stderr } = await runCommand([
      "127.0.0.1:9/app:1",
      join(folder, "a.tar"),
      option,
      folder,
      ...AMD64,
    ]);
    assert.equal(exitCode, 1);
    assert.match(stderr, /^imgpull: .* is not a file\n$/);
  });
}

test("an empty DEST is misuse", async () => {
  assert.equal((await runCommand(["alpine", ""])).exitCode, 2);
});

test("a password with an @ in what was meant as a reference is not repeated", async () => {
  const { exitCode, stderr } = await runCommand([
    `https://me:hun@${SECRETS.password}@host/app:1`,
    "a.tar",
  ]);
  assert.equal(exitCode, 2);
  for (const form of secretForms()) assert.ok(!stderr.includes(form));
});

test("sizes and digests nested deeper than a stack are refused in words", async (t) => {
  const registry = await startRegistry({}, t);
  const deep = `${"[".repeat(1_500_000)}${"]".repeat(1_500_000)}`;
  const bytes = Buffer.from(`{"schemaVersion":2,"config":{"digest":${deep}},"layers":[]}`);
  registry.on({ kind: "manifest" }, { body: bytes, status: 200 });
  const reference = registry.add(image, REFERENCE, "1.0");
  assertFailed(await tryPull(t, reference, { scheme: "http" }), "PROTOCOL", "an object");
});

test("a stored registrytoken that fits no header is an error that names its file", async (t) => {
  const registry = await startRegistry({ auth: "bearer" }, t);
  const reference = registry.add(image, REFERENCE, "1.0");
  const config = JSON.stringify({ auths: { [registry.host]: { registrytoken: "abc\nx" } } });
  const outcome = await tryPull(t, reference, {
    scheme: "http",
    environment: { DOCKER_AUTH_CONFIG: config },
  });
  assertFailed(outcome, "CREDENTIALS", "DOCKER_AUTH_CONFIG");
});

test("a folder's lock is let go although one of its files could not be opened", async (t) => {
  const registry = await startRegistry({}, t);
  const url = registry.add(image, REFERENCE, "1.0");
  const puller = new Puller({ url, scheme: "http", osType: "linux", archType: "amd64" });
  const holder = await puller.getManifest();
  const folder = temporaryFolder(t);
  const inTheWay = join(folder, `${image.config.digest.slice("sha256:".length)}.partial`);
  mkdirSync(inTheWay);
  await assert.rejects(puller.pullBlobs(holder, folder), { code: "DISK" });
  rmdirSync(inTheWay);
  await puller.pullBlobs(holder, folder);
});

test("a second pull into a layout that is being filled says so, and adds to it afterwards", async (t) => {
  const registry = await startRegistry({}, t);
  const held = gate();
  const [first, second] = [makeImage({ seed: "first" }), makeImage({ seed: "second" })];
  const urls = [registry.add(first, "team/first", "1"), registry.add(second, "team/second", "1")];
  const digest = first.layers[0]?.digest as string;
  registry.on({ digest }, { wait: held.promise });
  const folder = `${join(temporaryFolder(t), "layout")}/`;
  const [one, two] = urls.map(
    (url) => new Puller({ url, scheme: "http", osType: "linux", archType: "amd64" }),
  );
  const pulling = one?.pullTar(folder);
  await registry.arrived({ digest });
  await assert.rejects(
    two?.pullTar(folder) as Promise<unknown>,
    { code: "DISK" },
    "it says that another is at it",
  );
  held.open();
  await pulling;
  await two?.pullTar(folder);
  const { manifests } = JSON.parse(readFileSync(join(folder, "index.json"), "utf8")) as {
    manifests: unknown[];
  };
  assert.equal(manifests.length, 2);
});

test("what cannot be written to stdout is not a success", async (t) => {
  const registry = await startRegistry({}, t);
  const reference = registry.add(image, REFERENCE, "1.0");
  const tar = join(temporaryFolder(t), "a.tar");
  const args = ["-c", 'exec "$@" > /dev/full', "-", ...COMMAND, reference, tar, ...AMD64];
  const { exitCode, stderr } = await runCommand(args, { command: ["sh"] });
  assert.equal(exitCode, 1);
  assert.match(stderr, /cannot write stdout: the disk is full/);
});

test("many blobs out of one tar print nothing", async (t) => {
  const registry = await startRegistry({}, t);
  const reference = registry.add(
    makeImage({ layers: Array<number>(12).fill(8192) }),
    REFERENCE,
    "1.0",
  );
  const tar = join(temporaryFolder(t), "a.tar");
  for (const run of ["fetched", "taken from DEST"]) {
    const { exitCode, stderr } = await runCommand([reference, tar, ...AMD64]);
    assert.deepEqual([exitCode, stderr], [0, ""], run);
  }
});

test("a delta is not written over its own base", async (t) => {
  const registry = await startRegistry({}, t);
  const reference = registry.add(image, REFERENCE, "1.0");
  const folder = temporaryFolder(t);
  const tar = join(folder, "a.tar");
  await runCommand([reference, tar, ...AMD64]);
  const base = readFileSync(tar);
  symlinkSync("a.tar", join(folder, "link.tar"));
  for (const since of [tar, `${folder}/./a.tar`, join(folder, "link.tar")]) {
    const { exitCode, stderr } = await runCommand([reference, tar, "--since", since, ...AMD64]);
    assert.notEqual(exitCode, 0, since);
    assert.match(stderr, /--since/);
    assert.ok(readFileSync(tar).equals(base));
  }
});

test("a tar that leaves nothing out needs no base, and says so", async (t) => {
  const registry = await startRegistry({}, t);
  const folder = temporaryFolder(t);
  const base = registry.add(makeImage({ seed: "other" }), "team/other", "1.0");
  await runCommand([base, join(folder, "base.tar"), ...AMD64]);
  const reference = registry.add(image, REFERENCE, "1.0");
  const args = [reference, join(folder, "a.tar"), "--since", join(folder, "base.tar"), ...AMD64];
  const { exitCode, stderr } = await runCommand(args);
  assert.equal(exitCode, 0, stderr);
  assert.doesNotMatch(stderr, /load that first/);
});

test("a link at DEST to a file that is not there yet stays a link", async (t) => {
  const registry = await startRegistry({}, t);
  const reference = registry.add(image, REFERENCE, "1.0");
  const folder = temporaryFolder(t);
  mkdirSync(join(folder, "store"));
  symlinkSync("store/a.tar", join(folder, "a.tar"));
  const { exitCode, stderr } = await runCommand([reference, join(folder, "a.tar"), ...AMD64]);
  assert.equal(exitCode, 0, stderr);
  assert.equal(readlinkSync(join(folder, "a.tar")), "store/a.tar");
  assert.ok(readFileSync(join(folder, "store/a.tar")).length > 0);
});

test("a manifest that its registry knows by sha512 is pinned so that it is found again", async (t) => {
  const registry = await startRegistry({}, t);
  const reference = registry.add(makeImage({ algorithm: "sha512" }), REFERENCE, "1.0");
  const folder = temporaryFolder(t);
  const { stdout } = await runCommand([reference, join(folder, "a.tar"), ...AMD64]);
  const again = await runCommand([String(stdout).trim(), join(folder, "b.tar"), ...AMD64]);
  assert.equal(again.exitCode, 0, again.stderr);
  assert.ok(readFileSync(join(folder, "b.tar")).equals(readFileSync(join(folder, "a.tar"))));
});
