// References: what is taken, what is refused and why, what is requested, how the image is named.
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { test } from "node:test";
import { ImgpullError, internals, Puller } from "../imgpull.ts";
import { runCommand, type TestScope, temporaryFolder } from "./support/command.ts";
import { digestOf, makeImage, readTar } from "./support/image.ts";
import { type RegistryOptions, startRegistry } from "./support/registry.ts";

const { parseReference, formatReference, imageName, defaultDestination } = internals;

const SHA256 = digestOf("imgpull");
const SHA512 = digestOf("imgpull", "sha512");
const longName = (length: number) => "a".repeat(length);

type Parts = [host: string, repository: string, tag?: string, digest?: string];

function partsOf(text: string): Parts {
  const { host, repository, tag, digest } = parseReference(text);
  if (digest !== undefined) return [host, repository, tag ?? "", digest];
  return tag === undefined ? [host, repository] : [host, repository, tag];
}

// ====== What is taken ======

const TAKEN: [text: string, parts: Parts][] = [
  ["alpine", ["docker.io", "library/alpine", "latest"]],
  ["alpine:3.22", ["docker.io", "library/alpine", "3.22"]],
  ["bitnami/redis", ["docker.io", "bitnami/redis", "latest"]],
  ["a/b/c/d:1", ["docker.io", "a/b/c/d", "1"]],
  ["docker.io/hello-world:latest", ["docker.io", "library/hello-world", "latest"]],
  ["index.docker.io/hello-world", ["docker.io", "library/hello-world", "latest"]],
  ["registry-1.docker.io/hello-world", ["docker.io", "library/hello-world", "latest"]],
  ["registry-1.docker.io/library/hello-world", ["docker.io", "library/hello-world", "latest"]],
  ["docker.io/bitnami/redis:7", ["docker.io", "bitnami/redis", "7"]],
  ["localhost/app", ["localhost", "app", "latest"]],
  ["localhost:8080/curl/curl:8.10.1", ["localhost:8080", "curl/curl", "8.10.1"]],
  ["localhost", ["docker.io", "library/localhost", "latest"]],
  ["localhost:5000", ["docker.io", "library/localhost", "5000"]],
  ["quay.io/curl/curl:8.10.1", ["quay.io", "curl/curl", "8.10.1"]],
  ["quay.io", ["docker.io", "library/quay.io", "latest"]],
  ["myhost/app:1", ["docker.io", "myhost/app", "1"]],
  ["myhost:5000/app:1", ["myhost:5000", "app", "1"]],
  ["127.0.0.1:5000/app", ["127.0.0.1:5000", "app", "latest"]],
  ["[::1]:5000/app:1", ["[::1]:5000", "app", "1"]],
  ["[2001:db8::1]/team/app", ["[2001:db8::1]", "team/app", "latest"]],
  ["[::ffff:127.0.0.1]:443/app", ["[::ffff:127.0.0.1]:443", "app", "latest"]],
  ["localhost:8080/quay.io/curl/curl:8.10.1", ["localhost:8080", "quay.io/curl/curl", "8.10.1"]],
  [`alpine@${SHA256}`, ["docker.io", "library/alpine", "", SHA256]],
  [`quay.io/app:1@${SHA256}`, ["quay.io", "app", "1", SHA256]],
  [`quay.io/app@${SHA512}`, ["quay.io", "app", "", SHA512]],
  ["a.b/c__d/e-f---g/h.i_j:T-1_x.y", ["a.b", "c__d/e-f---g/h.i_j", "T-1_x.y"]],
  [`app:_${longName(127)}`, ["docker.io", "library/app", `_${longName(127)}`]],
  [`a.b/${longName(251)}:1`, ["a.b", longName(251), "1"]],
  ["a.b:1/c", ["a.b:1", "c", "latest"]],
  ["a.b:65535/c", ["a.b:65535", "c", "latest"]],
  ["xn--bcher-kva.example/app", ["xn--bcher-kva.example", "app", "latest"]],
];

test("references that are taken", () => {
  for (const [text, parts] of TAKEN) assert.deepEqual(partsOf(text), parts, text);
});

test("a reference written out reads as itself", () => {
  for (const [text] of TAKEN) {
    const reference = parseReference(text);
    assert.deepEqual(parseReference(formatReference(reference)), reference, text);
  }
  assert.equal(formatReference(parseReference("alpine")), "docker.io/library/alpine:latest");
  assert.equal(formatReference(parseReference(`a.b/c:1@${SHA256}`)), `a.b/c:1@${SHA256}`);
});

// ====== What is refused ======

const REFUSED: [text: string, reason: RegExp][] = [
  ["", /empty/],
  [" alpine", /character/],
  ["alpine\n", /character/],
  ["alp\u0000ine", /character/],
  ["bücher/app", /character/],
  ["https://quay.io/app", /scheme/],
  ["docker://alpine", /scheme/],
  ["Alpine", /lower case/],
  ["quay.io/Team/app", /lower case/],
  ["quay.io/", /repository/],
  ["/app", /repository/],
  ["quay.io//app", /repository/],
  ["quay.io/app/", /repository/],
  ["quay.io/../../etc/passwd", /repository/],
  ["quay.io/a/./b", /repository/],
  ["quay.io/a..b", /repository/],
  ["quay.io/a___b", /repository/],
  ["quay.io/-a", /repository/],
  ["quay.io/a-", /repository/],
  ["quay.io/a%2fb", /repository/],
  ["quay.io/a b", /character/],
  ["quay.io/app?x=1", /repository/],
  ["quay.io/app#x", /repository/],
  [":1", /repository/],
  ["app:", /tag/],
  ["app:.x", /tag/],
  ["app:-x", /tag/],
  ["app:a/b", /repository|tag|host/],
  [`app:${longName(129)}`, /tag/],
  ["app:1:2", /repository|tag/],
  ["a.b:0/c", /host/],
  ["a.b:65536/c", /host/],
  ["a.b:port/c", /host/],
  ["a.b:/c", /host/],
  ["-a.b/c", /host/],
  ["a..b/c", /host/],
  ["user@a.b/c", /digest|@/],
  ["::1/app", /host/],
  ["[::1/app", /host/],
  ["[::g]:5000/app", /host|IPv6/],
  ["[1.2.3.4]/app", /host|IPv6/],
  ["[fe80::1%25eth0]/app", /host|IPv6/],
  ["app@", /digest/],
  ["app@sha256:", /digest/],
  [`app@${SHA256.slice(0, -1)}`, /digest/],
  [`app@${SHA256}0`, /digest/],
  [`app@${SHA256.toUpperCase()}`, /digest/],
  [`app@sha256:${SHA256.slice(7).toUpperCase()}`, /digest/],
  ["app@sha256:../../x", /digest/],
  [`app@sha1:${longName(40)}`, /digest/],
  [`app@${SHA512.replace("sha512", "sha256")}`, /digest/],
  [`app@${SHA256}@${SHA256}`, /@/],
  [`a.b/${longName(252)}:1`, /255/],
];

test("references that are refused, each with its reason", () => {
  for (const [text, reason] of REFUSED) {
    assert.throws(
      () => parseReference(text),
      (error) => {
        assert.ok(error instanceof ImgpullError, text);
        assert.equal(error.code, "BAD_REFERENCE", text);
        assert.match(error.message, reason, text);
        assert.doesNotMatch(error.message, /\p{Cc}/u, text);
        return true;
      },
      text,
    );
    assert.throws(() => new Puller(text), { code: "BAD_REFERENCE" }, text);
  }
});

// ====== Names ======

const NAMED: [text: string, namespace: string | undefined, name: string][] = [
  ["alpine:3.22", undefined, "docker.io/library/alpine:3.22"],
  [`alpine@${SHA256}`, undefined, `docker.io/library/alpine@${SHA256}`],
  [`quay.io/app:1@${SHA256}`, undefined, "quay.io/app:1"],
  ["localhost:8080/app", undefined, "localhost:8080/app:latest"],
  ["localhost:8080/curl/curl:8.10.1", "quay.io", "quay.io/curl/curl:8.10.1"],
  ["localhost:8080/hello-world:latest", "docker.io", "docker.io/library/hello-world:latest"],
  [
    "localhost:8080/library/hello-world:latest",
    "docker.io",
    "docker.io/library/hello-world:latest",
  ],
  ["localhost:8080/app:1", "upstream:5000", "upstream:5000/app:1"],
  [`localhost:8080/curl/curl@${SHA256}`, "quay.io", `quay.io/curl/curl@${SHA256}`],
  ["localhost:8080/quay.io/curl/curl:8.10.1", undefined, "quay.io/curl/curl:8.10.1"],
  [`localhost:8080/quay.io/curl/curl@${SHA256}`, undefined, `quay.io/curl/curl@${SHA256}`],
  ["localhost:8080/docker.io/hello-world:1", undefined, "docker.io/library/hello-world:1"],
  ["localhost:8080/my.app:1", undefined, "localhost:8080/my.app:1"],
];

test("the name an image gets in the tar", () => {
  for (const [text, namespace, name] of NAMED) {
    assert.equal(
      formatReference(imageName(parseReference(text), namespace)),
      name,
      `${text} --ns ${namespace}`,
    );
  }
});

test("the tar's default name", () => {
  const cases: [string, string][] = [
    ["docker.io/hello-world:latest", "hello-world-latest.tar"],
    ["hello-world", "hello-world-latest.tar"],
    ["quay.io/curl/curl:8.10.1", "curl-8.10.1.tar"],
    [`quay.io/curl/curl:8.10.1@${SHA256}`, "curl-8.10.1.tar"],
    [`quay.io/curl/curl@${SHA256}`, `curl-${SHA256.slice(7, 19)}.tar`],
  ];
  for (const [text, file] of cases)
    assert.equal(defaultDestination(parseReference(text)), file, text);
});

// ====== What is requested ======

const image = makeImage({ seed: "reference", layers: [4096] });

interface Asked {
  name: string;
  paths: string[];
  namespaces: Set<string | null>;
}

async function askedFor(
  t: TestScope,
  rest: string,
  options: RegistryOptions = {},
  namespace?: string,
  repository = "team/app",
): Promise<Asked> {
  const registry = await startRegistry(options, t);
  registry.add(image, repository, "1.0");
  registry.add(image, repository, "latest");
  const dest = join(temporaryFolder(t), "app.tar");
  const puller = new Puller({
    url: `${registry.host}/${rest}`,
    scheme: "http",
    archType: "amd64",
    osType: "linux",
    ...(namespace !== undefined && { namespace }),
  });
  const { name } = await puller.pullTar(dest);
  const entries = readTar(readFileSync(dest));
  assert.ok(entries.some((entry) => entry.name === `blobs/${image.digest.replace(":", "/")}`));
  return {
    name: name.replace(registry.host, "HOST"),
    paths: [...new Set(registry.requests.map(({ path }) => path))],
    namespaces: new Set(registry.requests.map(({ query }) => query.get("ns"))),
  };
}

const blobPaths = [image.config.digest, ...image.layers.map(({ digest }) => digest)];

test("a tag, latest, a digest and both are asked for as such, and nothing else is", async (t) => {
  const cases: [rest: string, manifest: string, name: string][] = [
    ["team/app:1.0", "1.0", "HOST/team/app:1.0"],
    ["team/app", "latest", "HOST/team/app:latest"],
    [`team/app@${image.digest}`, image.digest, `HOST/team/app@${image.digest}`],
    [`team/app:gone@${image.digest}`, image.digest, "HOST/team/app:gone"],
  ];
  for (const [rest, manifest, named] of cases) {
    const { name, paths, namespaces } = await askedFor(t, rest);
    assert.equal(name, named, rest);
    assert.equal(paths[0], `/v2/team/app/manifests/${manifest}`, rest);
    assert.deepEqual(
      paths.slice(1).sort(),
      blobPaths.map((digest) => `/v2/team/app/blobs/${digest}`).sort(),
      rest,
    );
    assert.deepEqual([...namespaces], [null], rest);
  }
});

test("--ns is on every manifest and blob request, and names the image", async (t) => {
  const { name, paths, namespaces } = await askedFor(
    t,
    "curl/curl:1.0",
    {},
    "quay.io",
    "curl/curl",
  );
  assert.equal(name, "quay.io/curl/curl:1.0");
  assert.equal(paths.length, 3);
  assert.deepEqual([...namespaces], ["quay.io"]);
});

test("a mirror with the namespace in its path is asked as written, without ?ns=", async (t) => {
  const { name, paths, namespaces } = await askedFor(
    t,
    "quay.io/curl/curl:1.0",
    { prefix: "quay.io/" },
    undefined,
    "curl/curl",
  );
  assert.equal(name, "quay.io/curl/curl:1.0");
  assert.equal(paths[0], "/v2/quay.io/curl/curl/manifests/1.0");
  assert.deepEqual([...namespaces], [null]);
});

test("a bad reference in the options is refused before any request", async (t) => {
  const registry = await startRegistry({}, t);
  for (const rest of ["App:1", "app:1:2", "app@sha256:../../x", "../app:1"]) {
    assert.throws(() => new Puller({ url: `${registry.host}/${rest}`, scheme: "http" }), {
      code: "BAD_REFERENCE",
    });
  }
  assert.equal(registry.connections(), 0);
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
