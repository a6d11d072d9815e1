// What refers to an image comes along, and --signed-by takes only what a key has signed.
import assert from "node:assert/strict";
import { generateKeyPairSync } from "node:crypto";
import { existsSync, mkdirSync, readdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { Readable } from "node:stream";
import { type TestContext, test } from "node:test";
import { internals, Puller, pullImages } from "../imgpull.ts";
import { COMMAND, runCommand, SECRETS, temporaryFolder, USER } from "./support/command.ts";
import {
  digestOf,
  MEDIA,
  makeArtifact,
  makeImage,
  makeIndex,
  makeManifest,
  makeMultiPlatform,
  type TestContent,
  type TestImage,
  writeLink,
  writeTar,
} from "./support/image.ts";
import {
  addFallbackTag,
  BUNDLE,
  type BundleOptions,
  keyOf,
  makeBundle,
  makeBundleBytes,
  makePayloadLayer,
  makeSbom,
  makeSignatureTag,
  makeSigner,
  type PayloadOptions,
  SIMPLE_SIGNING,
  SUBJECT,
  sigTag,
  type TestSigner,
} from "./support/proof.ts";
import {
  assertFailed,
  blobName,
  failure,
  filesOf,
  type Outcome,
  type PullOptions,
  pull,
  tryPull,
} from "./support/pull.ts";
import { type Registry, type RegistryOptions, startRegistry } from "./support/registry.ts";

const { judge, LIMITS, parsePublicKey, readSignature } = internals;
const REPOSITORY = "team/app";
const WITH_ENDPOINT = { referrersPage: 100 };
const signer = makeSigner("P-256");
const stranger = makeSigner("P-256");
const image = makeImage({ seed: "signed" });
const other = makeImage({ seed: "another" });

interface IndexEntry {
  digest: string;
  artifactType?: string;
  annotations?: Record<string, string>;
}

interface Served {
  registry: Registry;
  reference: string;
}

async function serveWith(
  t: TestContext,
  contents: (TestContent | [content: TestContent, tag: string])[],
  options: RegistryOptions = WITH_ENDPOINT,
  subject: TestContent = image,
): Promise<Served> {
  const registry = await startRegistry(options, t);
  for (const each of contents) {
    if (Array.isArray(each)) registry.add(each[0], REPOSITORY, each[1]);
    else registry.add(each, REPOSITORY);
  }
  return { registry, reference: registry.add(subject, REPOSITORY, "1.0") };
}

const pullProof = (t: TestContext, { reference }: Served, options: PullOptions = {}) =>
  tryPull(t, reference, { scheme: "http", retries: 0, referrers: true, ...options });

function filesIn(outcome: Outcome): Map<string, Buffer> {
  if (outcome.error) throw outcome.error;
  return filesOf(readFileSync(outcome.tar));
}

function entriesIn(files: Map<string, Buffer>): IndexEntry[] {
  return JSON.parse(String(files.get("index.json"))).manifests;
}

const namelessIn = (files: Map<string, Buffer>): IndexEntry[] =>
  entriesIn(files).filter(({ annotations }) => !annotations?.["io.containerd.image.name"]);

function assertHolds(files: Map<string, Buffer>, ...contents: TestContent[]): void {
  for (const { digest, blobs } of contents) {
    for (const each of [digest, ...blobs.keys()]) assert(files.has(blobName(each)), each);
  }
}

// ====== Keys ======

const pem = (label: string, body = "AAAA") =>
  `-----BEGIN ${label}-----\n${body}\n-----END ${label}-----\n`;
for (const [name, text, words] of [
  ["a private key", pem("PRIVATE KEY"), /private key/],
  ["an EC private key", pem("EC PRIVATE KEY"), /private key/],
  ["cosign's own private key", pem("ENCRYPTED SIGSTORE PRIVATE KEY"), /private key/],
  ["a public key and its private one", signer.pem + pem("PRIVATE KEY"), /private key/],
  ["a certificate", pem("CERTIFICATE"), /certificate/],
  ["a PGP key", pem("PGP PUBLIC KEY BLOCK"), /PGP/],
  ["an SSH key", "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAI user@host", /no PEM public key/],
  ["nothing", "", /no PEM public key/],
  ["noise", "\0\u001b[31mred\u0007", /no PEM public key/],
  ["a PEM of noise", pem("PUBLIC KEY", "bm90IGEga2V5"), /damaged/],
  ["two keys", signer.pem + stranger.pem, /more than one key/],
] as const) {
  test(`--signed-by refuses ${name}, in words, without quoting it`, async () => {
    const error = await failure((async () => parsePublicKey(text, "the.key"))());
    assert.equal(error.code, "BAD_OPTION");
    assert.match(error.message, words);
    assert.match(error.message, /the\.key/);
    assert.doesNotMatch(error.message, /AAAA|bm90|red|OpenSSL|DECODER/);
  });
}

for (const [name, { publicKey }, words] of [
  ["an RSA key of 1024 bits", generateKeyPairSync("rsa", { modulusLength: 1024 }), /2048/],
  ["a curve that cosign has not", generateKeyPairSync("ec", { namedCurve: "secp256k1" }), /secp/],
  ["a key that does not sign", generateKeyPairSync("x25519"), /x25519/],
  ["an RSA-PSS key", generateKeyPairSync("rsa-pss", { modulusLength: 2048 }), /rsa-pss/],
] as const) {
  test(`--signed-by refuses ${name}`, async () => {
    const text = publicKey.export({ type: "spki", format: "pem" }).toString();
    const error = await failure((async () => parsePublicKey(text, "the.key"))());
    assert.equal(error.code, "BAD_OPTION");
    assert.match(error.message, words);
  });
}

test("an RSA key may come in either of its PEM forms", () => {
  const { publicKey } = generateKeyPairSync("rsa", { modulusLength: 2048 });
  for (const type of ["spki", "pkcs1"] as const)
    parsePublicKey(publicKey.export({ type, format: "pem" }).toString(), "rsa.pub");
});

// ====== Signatures ======

const judgeSignature = (
  layer: Parameters<typeof readSignature>[0],
  bytes: Buffer,
  digests: string[],
  keys: ReturnType<typeof parsePublicKey>[],
) => judge(readSignature(layer, bytes, keys), digests);

/** A layer as it stands in a manifest. */
const layerOf = (mediaType: string, bytes: Buffer, annotations: Record<string, string> = {}) => ({
  mediaType,
  digest: digestOf(bytes),
  size: bytes.length,
  annotations,
});

function judgePayload(options: PayloadOptions, by: TestSigner = signer, keys = [keyOf(signer)]) {
  const { mediaType, bytes, annotations } = makePayloadLayer(image, by, options);
  return judgeSignature(layerOf(mediaType, bytes, annotations), bytes, [image.digest], keys);
}

function judgeBundle(options: BundleOptions, by: TestSigner = signer, keys = [keyOf(signer)]) {
  const bytes = makeBundleBytes(image, by, options);
  return judgeSignature(layerOf(BUNDLE, bytes), bytes, [image.digest], keys);
}

const changed = (payload: Buffer) => Buffer.from(String(payload).replace("example", "exbmple"));
const spaced = (payload: Buffer) => Buffer.concat([payload, Buffer.from(" ")]);
const CERTIFICATE = { "dev.sigstore.cosign/certificate": pem("CERTIFICATE") };

for (const [name, verdict, expected] of [
  ["as cosign makes it", judgePayload({}), "good"],
  ["by one of two keys", judgePayload({}, signer, [keyOf(stranger), keyOf(signer)]), "good"],
  ["by another key", judgePayload({}, stranger), "other key"],
  ["of another digest", judgePayload({ digest: other.digest }), "other subject"],
  ["of another algorithm's digest", judgePayload({ digest: "sha512:00" }), "other subject"],
  ["whose payload was changed", judgePayload({ changeTo: changed }), "other key"],
  ["with a space behind the payload", judgePayload({ changeTo: spaced }), "other key"],
  ["of another type", judgePayload({ type: "atomic container signature" }), "unreadable"],
  ["of no type", judgePayload({ type: "" }), "unreadable"],
  ["keyless", judgePayload({ annotations: CERTIFICATE }, stranger), "keyless"],
  [
    "without a signature",
    judgePayload({ annotations: { "dev.cosignproject.cosign/signature": "" } }),
    "other key",
  ],
  [
    "with noise for a signature",
    judgePayload({ annotations: { "dev.cosignproject.cosign/signature": "\u0000é%%%" } }),
    "other key",
  ],
] as const) {
  test(`a signature ${name} is ${expected}`, () => assert.equal(verdict, expected));
}

for (const [name, verdict, expected] of [
  ["as cosign makes it", judgeBundle({}), "good"],
  [
    "with the older way of writing v0.3",
    judgeBundle({ mediaType: "application/vnd.dev.sigstore.bundle+json;version=0.3" }),
    "good",
  ],
  [
    "of the first in-toto",
    judgeBundle({ statementType: "https://in-toto.io/Statement/v0.1" }),
    "good",
  ],
  ["by another key", judgeBundle({}, stranger), "other key"],
  ["whose statement names another subject", judgeBundle({ digest: other.digest }), "other subject"],
  [
    "whose statement was changed",
    judgeBundle({
      changeTo: (bytes) => Buffer.from(String(bytes).replace("predicate", "predicbte")),
    }),
    "other key",
  ],
  [
    "whose payload is no in-toto statement by its type",
    judgeBundle({ payloadType: "application/json" }),
    "unreadable",
  ],
  [
    "that was signed under another payload type",
    judgeBundle({ signedType: "application/json" }),
    "other key",
  ],
  [
    "whose statement is of another type",
    judgeBundle({ statementType: "https://example.com/Statement/v1" }),
    "unreadable",
  ],
  [
    "of a version that nobody knows",
    judgeBundle({ mediaType: "application/vnd.dev.sigstore.bundle.v0.9+json" }),
    "unreadable",
  ],
  ["with a second signature", judgeBundle({ extraSignatures: ["AAAA"] }), "unreadable"],
  [
    "keyless",
    judgeBundle({ verificationMaterial: { certificate: { rawBytes: "AAAA" } } }, stranger),
    "keyless",
  ],
  [
    "keyless, with a chain",
    judgeBundle({ verificationMaterial: { x509CertificateChain: {} } }, stranger),
    "keyless",
  ],
] as const) {
  test(`a bundle ${name} is ${expected}`, () => assert.equal(verdict, expected));
}

for (const kind of ["P-256", "P-384", "P-521", "rsa", "ed25519"] as const) {
  test(`a ${kind} key signs in both forms`, () => {
    const by = makeSigner(kind);
    assert.equal(judgePayload({}, by, [keyOf(by)]), "good");
    assert.equal(judgeBundle({}, by, [keyOf(by)]), "good");
  });
}

test("P-384 with SHA-256, as cosign 2 signed", () => {
  const by = { ...makeSigner("P-384"), hash: "sha256" };
  assert.equal(judgePayload({}, by, [keyOf(by)]), "good");
});

const deep = (levels: number) => Buffer.from("[".repeat(levels) + "]".repeat(levels));
for (const [name, bytes] of [
  ["a million deep", deep(1_000_000)],
  ["of a million values", Buffer.from(`[${"0,".repeat(1_000_000)}0]`)],
  ["of a million objects", Buffer.from(`[${"{},".repeat(1_000_000)}{}]`)],
  ["that is cut off", Buffer.from('{"mediaType":"')],
  ["that ends in a backslash", Buffer.from('{"mediaType":"\\')],
  ["that is empty", Buffer.alloc(0)],
  ["that is null", Buffer.from("null")],
  ["that is a list", Buffer.from("[]")],
  ["with a list for an envelope", Buffer.from(`{"mediaType":"${BUNDLE}","dsseEnvelope":[]}`)],
  [
    "with fields of a prototype",
    Buffer.from(`{"mediaType":"${BUNDLE}","__proto__":{"dsseEnvelope":{}}}`),
  ],
] as const) {
  test(`a bundle ${name} is unreadable, at once`, () => {
    const startedAt = performance.now();
    const verdict = judgeSignature(layerOf(BUNDLE, bytes), bytes, [image.digest], [keyOf(signer)]);
    assert.equal(verdict, "unreadable");
    assert(performance.now() - startedAt < 1000);
  });
}

test("quotes, backslashes and brackets inside texts count for nothing", () => {
  const hint = `${'\\"'.repeat(500)}${"[".repeat(500)}\\`;
  const verificationMaterial = { publicKey: { hint } };
  assert.equal(judgeBundle({ verificationMaterial }), "good");
});

// ====== --signed-by ======

const signatureTag = (options: PayloadOptions = {}, by = signer): [TestContent, string] => [
  makeSignatureTag(makePayloadLayer(image, by, options)),
  sigTag(image),
];
const bundle = (options: BundleOptions = {}, by = signer): TestContent =>
  makeBundle(image, makeBundleBytes(image, by, options));
const SIGNED_BY = { signers: [keyOf(signer)], referrers: false };

for (const [name, contents, options] of [
  ["a signature under cosign's tag", [signatureTag()], {}],
  ["a bundle that the endpoint lists", [bundle()], WITH_ENDPOINT],
  ["a good one beside one by another key", [bundle(), bundle({}, stranger)], WITH_ENDPOINT],
  ["a good one beside noise", [bundle(), makeBundle(image, deep(100_000))], WITH_ENDPOINT],
] as const) {
  test(`${name} is enough`, async (t) => {
    const served = await serveWith(t, [...contents], options);
    const files = filesIn(await pullProof(t, served, SIGNED_BY));
    assertHolds(
      files,
      image,
      ...(contents.map((each) => (Array.isArray(each) ? each[0] : each)) as TestContent[]),
    );
  });
}

test("two signatures under one tag, of which one fits, are enough", async (t) => {
  const layers = [stranger, signer].map((by) => makePayloadLayer(image, by));
  const served = await serveWith(t, [[makeSignatureTag(...layers), sigTag(image)]]);
  filesIn(await pullProof(t, served, SIGNED_BY));
});

test("a bundle that only the fallback tag lists is enough", async (t) => {
  const served = await serveWith(t, [], {});
  const proof = bundle();
  addFallbackTag(served.registry, REPOSITORY, image, [proof]);
  assertHolds(filesIn(await pullProof(t, served, SIGNED_BY)), proof);
});

for (const [name, contents, words] of [
  ["nothing", [], /no signature at all/],
  ["an SBOM only", [makeSbom(image)], /no signature at all/],
  ["a signature by another key", [signatureTag({}, stranger)], /1 signature made by another key/],
  ["a signature of another digest", [signatureTag({ digest: other.digest })], /something else/],
  ["a changed payload", [signatureTag({ changeTo: changed })], /changed since/],
  ["another critical.type", [signatureTag({ type: "x" })], /no form that is known/],
  ["a bundle of another subject", [bundle({ digest: other.digest })], /something else/],
  ["a bundle of another payload type", [bundle({ payloadType: "text/plain" })], /no form/],
  ["a changed bundle", [bundle({ changeTo: spaced })], /changed since/],
  ["a keyless signature", [signatureTag({ annotations: CERTIFICATE }, stranger)], /keyless/],
  [
    "a keyless bundle",
    [bundle({ verificationMaterial: { certificate: {} } }, stranger)],
    /keyless/,
  ],
  ["a bundle that is deep", [makeBundle(image, deep(1_000_000))], /no form/],
  [
    "two that do not fit",
    [bundle({}, stranger), signatureTag({ type: "x" })],
    /1 signature made.*; 1 signature in no form/,
  ],
] as const) {
  test(`with ${name}, --signed-by refuses before any layer is asked for`, async (t) => {
    const served = await serveWith(t, [...contents]);
    const outcome = await pullProof(t, served, SIGNED_BY);
    assertFailed(outcome, "SIGNATURE", words, image.digest);
    const layers = image.layers.map(({ digest }) => digest);
    assert(!served.registry.requests.some(({ reference }) => layers.includes(reference)));
  });
}

test("a signature of another image's tag, under this image's, is for something else", async (t) => {
  const ofOther = makeSignatureTag(makePayloadLayer(other, signer));
  const served = await serveWith(t, [[ofOther, sigTag(image)]]);
  assertFailed(await pullProof(t, served, SIGNED_BY), "SIGNATURE", /something else/);
});

test("a list's word that another image's bundle refers to this one is not taken", async (t) => {
  const ofOther = makeBundle(other, makeBundleBytes(other, signer));
  const served = await serveWith(t, [], {});
  addFallbackTag(served.registry, REPOSITORY, image, [ofOther]);
  const outcome = await pullProof(t, served, SIGNED_BY);
  assertFailed(outcome, "SIGNATURE", /no signature at all/);
  assert.match(outcome.warnings.join(), /refers to something else/);
});

test("a signature whose bytes are not its digest's is refused by name", async (t) => {
  const [content, tag] = signatureTag();
  const served = await serveWith(t, [[content, tag]]);
  const [payload] = [...content.blobs.keys()].filter((each) => !content.configs.has(each));
  served.registry.putBlob(REPOSITORY, payload as string, Buffer.from("other bytes"));
  assertFailed(await pullProof(t, served, SIGNED_BY), "DIGEST_MISMATCH", payload as string);
});

test("a signature of the index vouches for the platform, and its bytes come along", async (t) => {
  const index = makeMultiPlatform(["linux/amd64", "linux/arm64"]);
  const proof = makeBundle(index, makeBundleBytes(index, signer));
  const served = await serveWith(t, [proof], WITH_ENDPOINT, index);
  const files = filesIn(await pullProof(t, served, SIGNED_BY));

  assertHolds(files, index.children[0] as TestContent, proof);
  assert.deepEqual(files.get(blobName(index.digest)), index.bytes);
  const [entry] = JSON.parse(String(files.get("index.json"))).manifests.slice(1);
  assert.deepEqual(
    entry.platform,
    { architecture: "unknown", os: "unknown" },
    "ctr would look for its other images",
  );
  assert.deepEqual(
    entriesIn(files).map(({ digest, annotations = {} }) => [
      digest,
      annotations.kind,
      annotations[SUBJECT],
    ]),
    [
      [index.children[0]?.digest, undefined, undefined],
      [index.digest, "dev.cosignproject.cosign/image", index.children[0]?.digest],
      [proof.digest, undefined, index.digest],
    ],
  );
});

test("a signature of the index under cosign's tag marks the index as one", async (t) => {
  const index = makeMultiPlatform(["linux/amd64", "linux/arm64"]);
  const tag = makeSignatureTag(makePayloadLayer(index, signer));
  const served = await serveWith(t, [[tag, sigTag(index)]], WITH_ENDPOINT, index);
  for (const isAll of [false, true]) {
    const files = filesIn(await pullProof(t, served, { ...SIGNED_BY, isAll }));
    const kinds = entriesIn(files).map(({ digest, annotations }) => [digest, annotations?.kind]);
    const marked = kinds.filter(([, kind]) => kind !== undefined);
    assert.deepEqual(marked, [
      [index.digest, "dev.cosignproject.cosign/imageIndex"],
      [tag.digest, "dev.cosignproject.cosign/sigs"],
    ]);
  }
});

test("of an index whose images are signed too, only its own signature is marked for cosign", async (t) => {
  const index = makeMultiPlatform(["linux/amd64", "linux/arm64"]);
  const tags = [index, ...index.children].map((each): [TestContent, string] => [
    makeSignatureTag(makePayloadLayer(each, signer)),
    sigTag(each),
  ]);
  const served = await serveWith(t, tags, WITH_ENDPOINT, index);
  for (const isAll of [false, true]) {
    const files = filesIn(await pullProof(t, served, { ...SIGNED_BY, isAll }));
    const entries = namelessIn(files).filter(({ annotations }) => annotations?.kind);
    const sigs = entries.filter(({ annotations }) => annotations?.kind?.endsWith("/sigs"));
    assert.deepEqual(
      sigs.map(({ digest, annotations }) => [digest, annotations?.[SUBJECT]]),
      [[tags[0]?.[0].digest, index.digest]],
    );
  }
});

test("of an index with an SBOM and a platform with a signature, the platform is marked for cosign", async (t) => {
  const index = makeMultiPlatform(["linux/amd64", "linux/arm64"]);
  const [child] = index.children as [TestContent];
  const signature = makeSignatureTag(makePayloadLayer(child, signer));
  const contents: (TestContent | [TestContent, string])[] = [
    makeSbom(index),
    [signature, sigTag(child)],
  ];
  const served = await serveWith(t, contents, WITH_ENDPOINT, index);
  const files = filesIn(await pullProof(t, served, SIGNED_BY));
  assertHolds(files, makeSbom(index), signature);
  const marks = entriesIn(files).map(({ digest, annotations }) => [digest, annotations?.kind]);
  assert.deepEqual(
    marks.filter(([, kind]) => kind !== undefined).sort(),
    [
      [child.digest, "dev.cosignproject.cosign/image"],
      [signature.digest, "dev.cosignproject.cosign/sigs"],
    ].sort(),
  );
});

test("a signature of one platform does not vouch for the whole index", async (t) => {
  const index = makeMultiPlatform(["linux/amd64", "linux/arm64"]);
  const [child] = index.children as [TestContent];
  const proof = makeBundle(child, makeBundleBytes(child, signer));
  const served = await serveWith(t, [proof], WITH_ENDPOINT, index);
  filesIn(await pullProof(t, served, SIGNED_BY));
  const outcome = await pullProof(t, served, { ...SIGNED_BY, isAll: true });
  assertFailed(outcome, "SIGNATURE", index.digest);
});

test("a signature of an index inside the index: all that leads to the platform comes along", async (t) => {
  const inner = makeMultiPlatform(["linux/amd64", "linux/arm64"]);
  const outer = makeIndex([{ content: inner, platform: "linux/amd64" }]);
  const proof = makeBundle(outer, makeBundleBytes(outer, signer));
  const served = await serveWith(t, [proof], WITH_ENDPOINT, outer);
  const files = filesIn(await pullProof(t, served, SIGNED_BY));
  for (const { digest, bytes } of [outer, inner])
    assert.deepEqual(files.get(blobName(digest)), bytes);
});

// ====== --referrers ======

test("referrers come along, each by its own manifest's word, sorted by digest", async (t) => {
  const sbom = makeSbom(image);
  const attestation = makeSignatureTag({
    ...makePayloadLayer(image, signer),
    mediaType: "application/vnd.dsse.envelope.v1+json",
  });
  const plain = makeArtifact({
    configMediaType: "application/vnd.example.config",
    subject: image,
    layers: [],
  });
  const [tagged, tag] = signatureTag();
  const all = [sbom, attestation, plain, tagged];
  const served = await serveWith(t, [
    sbom,
    plain,
    [attestation, sigTag(image, ".att")],
    [tagged, tag],
  ]);
  const files = filesIn(await pullProof(t, served));

  assertHolds(files, image, ...all);
  const types = new Map([
    [sbom.digest, "application/spdx+json"],
    [plain.digest, "application/vnd.example.config"],
  ]);
  const kinds = new Map([
    [tagged.digest, "dev.cosignproject.cosign/sigs"],
    [attestation.digest, "dev.cosignproject.cosign/atts"],
  ]);
  const expected = all.map(({ digest }) => digest).sort();
  assert.deepEqual(
    namelessIn(files),
    expected.map((digest) => {
      const kind = kinds.get(digest);
      const artifactType = types.get(digest);
      return {
        mediaType: MEDIA.ociManifest,
        digest,
        size: files.get(blobName(digest))?.length,
        annotations: { [SUBJECT]: image.digest, ...(kind && { kind }) },
        ...(artifactType && { artifactType }),
      };
    }),
  );
  const docker = JSON.parse(String(files.get("manifest.json")));
  assert.equal(docker.length, 1, "none of it counts as an image");
});

test("the same tar whatever the order, the pages and the way of the lists", async (t) => {
  const sboms = Array.from({ length: 7 }, (_, at) => makeSbom(image, `sbom ${at}`));
  const tars = [];
  for (const referrersPage of [100, 2, 1]) {
    const contents = referrersPage === 1 ? sboms.toReversed() : sboms;
    const { reference } = await serveWith(t, contents, { referrersPage });
    const dest = join(temporaryFolder(t), "app.tar");
    await pull(reference, dest, { referrers: true });
    tars.push(readFileSync(dest));
  }
  const fallback = await serveWith(t, [], {});
  addFallbackTag(fallback.registry, REPOSITORY, image, sboms);
  const dest = join(temporaryFolder(t), "app.tar");
  await pull(fallback.reference, dest, { referrers: true });
  tars.push(readFileSync(dest));

  assertHolds(filesOf(tars[0] as Buffer), ...sboms);
  for (const tar of tars.slice(1)) assert(tar.equals(tars[0] as Buffer));
});

test("referrers of referrers come along, four deep", async (t) => {
  const chain = [makeSbom(image)];
  for (let at = 1; at < 6; at += 1) chain.push(makeSbom(chain[at - 1] as TestContent, `${at}`));
  const served = await serveWith(t, chain);
  const names = namelessIn(filesIn(await pullProof(t, served))).map(({ digest }) => digest);
  assert.deepEqual(
    names,
    chain
      .slice(0, 4)
      .map(({ digest }) => digest)
      .sort(),
  );
});

test("an index may be a referrer, with all below it", async (t) => {
  const parts = makeMultiPlatform(["linux/amd64", "linux/arm64"], {
    seed: "parts",
    editIndex: (index) => ({
      ...index,
      subject: { mediaType: image.mediaType, digest: image.digest, size: image.bytes.length },
    }),
  });
  const served = await serveWith(t, [parts]);
  assertHolds(filesIn(await pullProof(t, served)), parts, ...parts.children);
});

test("with every platform, what refers to the index and to each of its images comes", async (t) => {
  const index = makeMultiPlatform(["linux/amd64", "linux/arm64"], { attestations: true });
  const sboms = [index, ...index.children].map((each, at) => makeSbom(each, `${at}`));
  const served = await serveWith(t, sboms, WITH_ENDPOINT, index);
  const files = filesIn(await pullProof(t, served, { isAll: true }));
  assertHolds(files, index, ...sboms);
  assert.equal(namelessIn(files).length, sboms.length);
});

test("without referrers the tar is that of a pull without --referrers", async (t) => {
  for (const options of [{}, WITH_ENDPOINT]) {
    const served = await serveWith(t, [], options);
    const [plain, proven] = [
      await pullProof(t, served, { referrers: false }),
      await pullProof(t, served),
    ];
    assert.deepEqual(filesIn(proven), filesIn(plain));
    assert.deepEqual(plain.warnings, []);
    assert.deepEqual(proven.warnings, [
      `${proven.result?.name}: no signature, attestation or SBOM was found`,
    ]);
  }
});

for (const status of [400, 404, 405, 406]) {
  test(`an endpoint that answers ${status} is none`, async (t) => {
    const served = await serveWith(t, []);
    addFallbackTag(served.registry, REPOSITORY, image, [makeSbom(image)]);
    const rule = served.registry.on({ path: /referrers/ }, { status });
    assertHolds(filesIn(await pullProof(t, served)), makeSbom(image));
    assert(rule.hits > 0);
  });
}

for (const [name, answer] of [
  ["a page for people", { status: 200, body: "<html>Log in</html>" }],
  ["a JSON of its own", { status: 200, body: '{"status":"ok"}' }],
] as const) {
  test(`an endpoint that answers ${name} is none`, async (t) => {
    const served = await serveWith(t, [], {});
    addFallbackTag(served.registry, REPOSITORY, image, [makeSbom(image)]);
    served.registry.on({ path: /referrers/ }, answer);
    const outcome = await pullProof(t, served);
    assertHolds(filesIn(outcome), makeSbom(image));
    assert.deepEqual(outcome.warnings.length, 1, "only of loaders");
  });
}

/** By a credential that is stored: one that is refused would be given up. */
function loggedIn(t: TestContext, { registry }: Served): PullOptions {
  const docker = temporaryFolder(t);
  const login = Buffer.from(`${USER}:${SECRETS.password}`).toString("base64");
  const auths = { [registry.host]: { auth: login } };
  writeFileSync(join(docker, "config.json"), JSON.stringify({ auths }));
  return { environment: { DOCKER_CONFIG: docker } };
}

for (const auth of ["basic", "bearer"] as const) {
  for (const status of [401, 403]) {
    test(`${auth}: a list that is denied (${status}) costs no credential, and is said`, async (t) => {
      const served = await serveWith(t, [], { auth });
      addFallbackTag(served.registry, REPOSITORY, image, [makeSbom(image)]);
      const rule = served.registry.on({ path: /referrers/ }, { status });
      const outcome = await pullProof(t, served, loggedIn(t, served));
      assertHolds(filesIn(outcome), image, makeSbom(image));
      assert(rule.hits > 0);
      const told = outcome.warnings.filter((line) => line.includes(String(status)));
      assert.equal(told.length, 1, outcome.warnings.join("\n"));
      assert.doesNotMatch(outcome.warnings.join(), /credentials/);
    });
  }
}

// As Artifactory does of what is not there: sigstore/cosign#2973.
for (const auth of ["none", "basic", "bearer"] as const) {
  for (const status of [401, 403]) {
    test(`${auth}: tags that are denied (${status}) are not there, and it is said once`, async (t) => {
      const served = await serveWith(t, [], { auth });
      const rule = served.registry.on({ path: /manifests\/sha256-/ }, { status });
      const options = auth === "none" ? {} : loggedIn(t, served);
      const outcome = await pullProof(t, served, options);
      assertHolds(filesIn(outcome), image);
      assert(rule.hits > 0);
      const told = outcome.warnings.filter((line) => line.includes(`answered ${status}`));
      assert.equal(told.length, 1, outcome.warnings.join("\n"));
      assert.match(String(told), /taken as not there/);
      assert.match(outcome.warnings.join(), /no signature, attestation or SBOM was found/);
      assert.doesNotMatch(outcome.warnings.join(), /credentials/);
    });
  }
}

test("a challenge for a tag that is not there hinders nothing else", async (t) => {
  const served = await serveWith(t, []);
  const { registry } = served;
  registry.on({ path: "/refused" }, { status: 401 });
  for (const challenge of ['Basic realm="x"', `Bearer realm="${registry.url}/refused"`]) {
    const headers = { "www-authenticate": challenge };
    const rule = registry.on({ path: /sha256-|referrers/ }, { status: 401, headers });
    const outcome = await pullProof(t, served);
    assertHolds(filesIn(outcome), image);
    assert(rule.hits > 0);
    rule.remove();
  }
});

test("--signed-by says of a signature that may be there that it was denied", async (t) => {
  const served = await serveWith(t, []);
  served.registry.on({ path: /manifests\/sha256-.*\.sig/ }, { status: 403 });
  const outcome = await pullProof(t, served, SIGNED_BY);
  assertFailed(outcome, "SIGNATURE", /no signature at all; but .* denied: .*\.sig: .* 403/);
});

test("--signed-by takes what the endpoint lists, whatever is denied of tags", async (t) => {
  const proof = bundle();
  const served = await serveWith(t, [proof], WITH_ENDPOINT);
  const rule = served.registry.on({ path: /manifests\/sha256-/ }, { status: 403 });
  assertHolds(filesIn(await pullProof(t, served, SIGNED_BY)), proof);
  assert(rule.hits > 0);
});

test("what a list names is not taken as absent where it is denied", async (t) => {
  const served = await serveWith(t, [], {});
  addFallbackTag(served.registry, REPOSITORY, image, [makeSbom(image)]);
  served.registry.on({ digest: makeSbom(image).digest }, { status: 403 });
  assertFailed(await pullProof(t, served), "FORBIDDEN", "403");
});

test("a list that fails otherwise is no empty one", async (t) => {
  const served = await serveWith(t, []);
  served.registry.on({ path: /referrers/ }, { status: 500 });
  const { error } = await pullProof(t, served);
  assert.match(String(error), /500/);
});

test("a list whose second page is not there is no short one", async (t) => {
  const sboms = Array.from({ length: 3 }, (_, at) => makeSbom(image, `sbom ${at}`));
  const served = await serveWith(t, sboms, { referrersPage: 2 });
  served.registry.on({ path: /referrers/, skip: 1, times: 1 }, { status: 500 });
  const { error } = await pullProof(t, served);
  assert.match(String(error), /500/);
});

test("what a list names and the registry has not is a warning", async (t) => {
  const [here, gone] = [makeSbom(image, "here"), makeSbom(image, "gone")];
  const served = await serveWith(t, [], {});
  addFallbackTag(served.registry, REPOSITORY, image, [here, gone]);
  served.registry.remove(REPOSITORY, gone.digest);
  const outcome = await pullProof(t, served);
  assert.deepEqual(
    namelessIn(filesIn(outcome)).map(({ digest }) => digest),
    [here.digest],
  );
  assert(outcome.warnings.some((line) => line.includes(gone.digest) && /not there/.test(line)));
});

test("a fallback tag that is no index lists nothing", async (t) => {
  const served = await serveWith(t, [[other, sigTag(image, "")]], {});
  assert.deepEqual(namelessIn(filesIn(await pullProof(t, served))), []);
});

for (const [name, link] of [
  ["another host", '<http://127.0.0.1:1/v2/team/app/referrers/x>; rel="next"'],
  ["no URL", '<http://[>; rel="next"'],
] as const) {
  test(`a next page on ${name} is refused`, async (t) => {
    const served = await serveWith(t, []);
    const headers = { link };
    served.registry.on({ path: /referrers/ }, { status: 200, body: '{"manifests":[]}', headers });
    assertFailed(await pullProof(t, served), "PROTOCOL", /next page/);
  });
}

test("a Link header of a megabyte is read at once, whatever it holds", {
  timeout: 20_000,
}, async (t) => {
  for (const link of [
    "<".repeat(900_000),
    `<x>${";".repeat(900_000)}`,
    `<x>${"; ".repeat(450_000)}`,
  ]) {
    const served = await serveWith(t, []);
    served.registry.on(
      { path: /referrers/ },
      { status: 200, body: '{"manifests":[]}', headers: { link } },
    );
    assert.deepEqual(namelessIn(filesIn(await pullProof(t, served))), []);
  }
});

test("pages without end are refused by their number", async (t) => {
  const served = await serveWith(t, []);
  const headers = { link: '<?page=2>; rel="next"' };
  const rule = served.registry.on(
    { path: /referrers/ },
    { status: 200, body: '{"manifests":[]}', headers },
  );
  assertFailed(await pullProof(t, served), "TOO_LARGE", `${LIMITS.referrerPages} pages`);
  assert(rule.hits <= LIMITS.referrerPages + 1);
});

test("more referrers than the bound are refused by name, before any is asked for", async (t) => {
  const served = await serveWith(t, []);
  const manifests = Array.from({ length: LIMITS.referrers + 1 }, (_, at) => ({
    mediaType: MEDIA.ociManifest,
    digest: digestOf(String(at)),
    size: 2,
  }));
  const body = JSON.stringify({ schemaVersion: 2, manifests });
  served.registry.on({ path: /referrers/ }, { status: 200, body });
  assertFailed(await pullProof(t, served), "TOO_LARGE", `more than ${LIMITS.referrers} referrers`);
  assert(!served.registry.requests.some(({ reference }) => reference === manifests[0]?.digest));
});

test("a tag of cosign's that names the image itself adds nothing", async (t) => {
  const served = await serveWith(t, [[image, sigTag(image)]]);
  assert.deepEqual(namelessIn(filesIn(await pullProof(t, served))), []);
});

test("a digest in a list that is none is refused", async (t) => {
  const served = await serveWith(t, []);
  const body = JSON.stringify({
    manifests: [{ mediaType: MEDIA.ociManifest, digest: "../../etc", size: 2 }],
  });
  served.registry.on({ path: /referrers/ }, { status: 200, body });
  assertFailed(await pullProof(t, served), "PROTOCOL", /not a digest/);
});

test("a folder gets them too, and keeps those of other images", async (t) => {
  const folder = temporaryFolder(t);
  const served = await serveWith(t, [makeSbom(image), makeSbom(other)]);
  const second = served.registry.add(other, "team/app", "2.0");
  await pull(served.reference, `${folder}/`, { referrers: true });
  const registry = internals.parseReference(second);
  assert.equal(registry.tag, "2.0");
  await internals.withSession({ url: second, scheme: "http" }, (session) =>
    internals.runPull(
      session,
      {
        images: [{ reference: registry, name: "example.com/team/other:2.0" }],
        destination: `${folder}/`,
        reuse: [],
        referrers: true,
      },
      () => undefined,
    ),
  );
  const { manifests } = JSON.parse(readFileSync(join(folder, "index.json"), "utf8"));
  const digests = (manifests as IndexEntry[]).map(({ digest }) => digest).sort();
  assert.deepEqual(
    digests,
    [image, other, makeSbom(image), makeSbom(other)].map(({ digest }) => digest).sort(),
  );
  const blobs = readdirSync(join(folder, "blobs/sha256"));
  for (const { blobs: held } of [makeSbom(image), makeSbom(other)])
    for (const digest of held.keys()) assert(blobs.includes(digest.slice(7)));
});

test("a second pull of the same finds it unchanged, and fetches no blob", async (t) => {
  const served = await serveWith(t, [makeSbom(image), bundle()]);
  const dest = join(temporaryFolder(t), "app.tar");
  await pull(served.reference, dest, { referrers: true });
  const before = readFileSync(dest);
  const { fetchedBytes } = await pull(served.reference, dest, { referrers: true });
  assert.equal(fetchedBytes, 0);
  assert(readFileSync(dest).equals(before));
});

test("a manifest list of nothing but noise is no list", async (t) => {
  const served = await serveWith(
    t,
    [
      [
        makeManifest(MEDIA.ociIndex, { schemaVersion: 2, manifests: "x", config: {}, layers: [] }),
        sigTag(image, ""),
      ],
    ],
    {},
  );
  assert.deepEqual(namelessIn(filesIn(await pullProof(t, served))), []);
});

test("a layer's media type alone makes a signature of nothing", () => {
  const bytes = Buffer.from("{}");
  assert.equal(
    judgeSignature(layerOf(SIMPLE_SIGNING, bytes), bytes, [image.digest], [keyOf(signer)]),
    "other key",
  );
});

test("what is too large for a signature is not asked for", async (t) => {
  const proof = bundle();
  const json = JSON.parse(String(proof.bytes));
  json.layers[0].size = 20_000_000;
  const claimed = makeManifest(MEDIA.ociManifest, json);
  const served = await serveWith(t, [{ ...claimed, blobs: proof.blobs, configs: proof.configs }]);
  assertFailed(await pullProof(t, served, SIGNED_BY), "SIGNATURE", /no form that is known/);
  const [layer] = [...proof.blobs.keys()].filter((digest) => !proof.configs.has(digest));
  assert(!served.registry.requests.some(({ reference }) => reference === layer));
});

test("more signatures than the bound are refused by name", async (t) => {
  const one = makePayloadLayer(image, stranger);
  const layers = Array.from({ length: LIMITS.signatures + 1 }, () => one);
  const served = await serveWith(t, [[makeSignatureTag(...layers), sigTag(image)]]);
  assertFailed(
    await pullProof(t, served, SIGNED_BY),
    "TOO_LARGE",
    `${LIMITS.signatures} signatures`,
  );
});

test("attestations that are large are no part of what a pull may keep in memory", async (t) => {
  const seeds = Array.from({ length: 12 }, (_, at) => `heavy ${at}`);
  const heavy = seeds.map((seed) => makeBundle(image, Buffer.alloc(8 * 1024 * 1024, seed)));
  const served = await serveWith(t, [...heavy, bundle()]);
  assertHolds(filesIn(await pullProof(t, served, SIGNED_BY)), ...heavy);
});

// ====== What is no pull of a tar ======

const CALLS: [name: string, call: (puller: Puller) => Promise<unknown>][] = [
  ["getManifest", (puller) => puller.getManifest()],
  ["headManifest", (puller) => puller.headManifest()],
  ["pullManifest of a list", (puller) => puller.pullManifest("list")],
  ["pullManifest of an image", (puller) => puller.pullManifest("image")],
];

for (const [name, call] of CALLS) {
  test(`${name} gives only what is signed`, async (t) => {
    const index = makeMultiPlatform(["linux/amd64", "linux/arm64"]);
    const platform = { osType: "linux", archType: "amd64" };
    const proof = makeBundle(index, makeBundleBytes(index, signer));
    const { reference } = await serveWith(t, [proof], WITH_ENDPOINT, index);
    const options = { url: reference, scheme: "http", ...platform } as const;
    await call(new Puller({ ...options, signedBy: [stranger.pem, signer.pem] }));
    const error = await failure(call(new Puller({ ...options, signedBy: [stranger.pem] })));
    assert.equal(error.code, "SIGNATURE");
  });
}

test("pullBlobs takes the blobs of what is signed, by itself or by the index above it", async (t) => {
  const index = makeMultiPlatform(["linux/amd64", "linux/arm64"]);
  const proof = makeBundle(index, makeBundleBytes(index, signer));
  const { reference, registry } = await serveWith(t, [proof], WITH_ENDPOINT, index);
  const options = { url: reference, scheme: "http", osType: "linux", archType: "amd64" } as const;
  const holder = await new Puller(options).pullManifest("image");
  const folder = temporaryFolder(t);
  await new Puller({ ...options, signedBy: [signer.pem] }).pullBlobs(holder, join(folder, "good"));

  const forged = makeImage({ seed: "forged" });
  registry.add(forged, REPOSITORY);
  const claimed = { ...holder, bytes: forged.bytes };
  for (const [given, key] of [
    [holder, stranger],
    [claimed, signer],
  ] as const) {
    const puller = new Puller({ ...options, signedBy: [key.pem] });
    const error = await failure(puller.pullBlobs(given, join(folder, "bad")));
    assert.equal(error.code, "SIGNATURE");
  }
  assert.deepEqual(readdirSync(folder), ["good"]);
});

test("the command prints no manifest that is not signed", async (t) => {
  const { reference } = await serveWith(t, [bundle()]);
  const folder = temporaryFolder(t);
  const [good, bad] = [join(folder, "good.pub"), join(folder, "bad.pub")];
  writeFileSync(good, signer.pem);
  writeFileSync(bad, stranger.pem);
  const show = (key: string) =>
    runCommand([reference, "--manifest", "image", "--scheme", "http", "--signed-by", key]);
  assert.equal(String((await show(good)).stdout), String(image.bytes));
  const refused = await show(bad);
  assert.equal(refused.exitCode, 1);
  assert.equal(refused.stdout.length, 0);
  assert.match(refused.stderr, /not signed by any key given \(--signed-by\)/);
});

test("the command names a key file that it cannot read or use, as usage", async (t) => {
  const folder = temporaryFolder(t);
  const privateKey = join(folder, "cosign.key");
  writeFileSync(privateKey, pem("ENCRYPTED SIGSTORE PRIVATE KEY"));
  for (const [key, words] of [
    [join(folder, "none.pub"), /none\.pub: no such file/],
    [privateKey, /cosign\.key is a private key/],
  ] as const) {
    const { exitCode, stderr } = await runCommand(["a:1", "a.tar", "--signed-by", key]);
    assert.equal(exitCode, 2, stderr);
    assert.match(stderr, words);
  }
});

test("a list of keys without a key is refused: it would check nothing", async (t) => {
  const { reference } = await serveWith(t, [bundle()]);
  const options = { scheme: "http", signedBy: [] } as const;
  const tar = join(temporaryFolder(t), "app.tar");
  for (const call of [
    () => pullImages([reference], tar, options),
    () => new Puller({ ...options, url: reference }).getManifest(),
    () => internals.verifyTar(tar, { signedBy: [] }),
  ]) {
    const error = await failure(call());
    assert.equal(error.code, "BAD_OPTION");
    assert.match(error.message, /empty list/);
  }
});

const skip = process.platform === "win32" && "it has no pipes with a path";
test("a key may come by a pipe, and of a device no more is read than a key has", {
  skip,
}, async (t) => {
  const { reference } = await serveWith(t, [bundle()]);
  const folder = temporaryFolder(t);
  writeFileSync(join(folder, "good.pub"), signer.pem);
  const pipe = join(folder, "key");
  const flags = ["--scheme", "http", "--manifest", "image", "--signed-by"];
  const piped = `mkfifo "$0"; cat good.pub > "$0" & exec "$@"`;
  const command: [string, ...string[]] = [
    "sh",
    "-c",
    piped,
    pipe,
    ...COMMAND,
    reference,
    ...flags,
    pipe,
  ];
  const { exitCode, stderr } = await runCommand([], { command, cwd: folder });
  assert.equal(exitCode, 0, stderr);
  const zeros = await runCommand([reference, ...flags, "/dev/zero"]);
  assert.equal(zeros.exitCode, 2);
  assert.match(zeros.stderr, /no PEM public key/);
});

test("a referrer that cannot be read is left out, and said", async (t) => {
  const subject = { mediaType: image.mediaType, digest: image.digest, size: image.bytes.length };
  const broken = makeManifest(MEDIA.ociManifest, { schemaVersion: 2, subject, config: {} });
  const cut = makeMultiPlatform(["linux/amd64"], {
    seed: "cut",
    editIndex: (index) => ({ ...index, subject }),
  });
  const served = await serveWith(t, [makeSbom(image), broken, cut]);
  served.registry.remove(REPOSITORY, cut.children[0]?.digest as string);
  const outcome = await pullProof(t, served);
  const held = namelessIn(filesIn(outcome)).map(({ digest }) => digest);
  assert.deepEqual(held, [makeSbom(image).digest]);
  for (const { digest } of [broken, cut])
    assert(outcome.warnings.some((line) => line.includes(`left out the referrer ${digest}`)));
});

test("two tags of one repository: each is named by its own", async (t) => {
  const { registry, reference } = await serveWith(t, []);
  const second = registry.add(other, REPOSITORY, "2.0");
  const [first, last] = [reference, second].map((each) => internals.parseReference(each));
  for (const options of [{ signers: [keyOf(signer)] }, { choice: [{ os: "windows" }] }]) {
    const images = [first, last].map((each) => ({
      reference: each as NonNullable<typeof first>,
      name: `example.com/${each?.tag}:1`,
    }));
    const destination = join(temporaryFolder(t), "app.tar");
    const error = await failure(
      internals.withSession({ scheme: "http", retries: 0 }, (session) =>
        internals.runPull(session, { images, destination, ...options }, () => undefined),
      ),
    );
    assert.match(error.message, /team\/app:1\.0/);
    assert.match(error.message, /team\/app:2\.0/);
  }
});

// ====== Offline ======

interface IndexJson {
  manifests: (IndexEntry & { mediaType: string; size: number; platform?: unknown })[];
}

/** A signed image in a tar, as files that a test may change before somebody carries it over. */
async function carried(
  t: TestContext,
  options: PullOptions = {},
  subject: TestContent = image,
  contents: (TestContent | [TestContent, string])[] = [bundle(), signatureTag()],
): Promise<Map<string, Buffer>> {
  const served = await serveWith(t, contents, WITH_ENDPOINT, subject);
  return filesIn(await pullProof(t, served, options));
}

function writeFiles(t: TestContext, files: Map<string, Buffer>): string {
  const tar = join(temporaryFolder(t), "carried.tar");
  writeFileSync(tar, writeTar(files));
  return tar;
}

const verify = (tar: string, ...keys: TestSigner[]) =>
  internals.verifyTar(tar, { signedBy: keys.map(({ pem: text }) => text) });

async function assertUnsigned(tar: string, words: RegExp): Promise<void> {
  await internals.verifyTar(tar); // all else is right
  const error = await failure(verify(tar, signer));
  assert.equal(error.code, "SIGNATURE", error.message);
  assert.match(error.message, words);
}

const changeJson = <T>(files: Map<string, Buffer>, name: string, change: (json: T) => unknown) =>
  files.set(name, Buffer.from(JSON.stringify(change(JSON.parse(String(files.get(name)))))));

function addContent(files: Map<string, Buffer>, ...contents: TestContent[]): void {
  for (const { manifests, blobs } of contents) {
    for (const [digest, { bytes }] of manifests) files.set(blobName(digest), bytes);
    for (const [digest, bytes] of blobs) files.set(blobName(digest), bytes);
  }
}

const entryOf = ({ mediaType, digest, bytes }: TestContent, annotations = {}) => ({
  mediaType,
  digest,
  size: bytes.length,
  annotations,
});
const nameOf = (name: string) => ({
  "io.containerd.image.name": name,
  "org.opencontainers.image.ref.name": name,
});
const dockerEntryOf = ({ config, layers }: TestImage, name: string) => ({
  Config: blobName(config.digest),
  RepoTags: [name],
  Layers: layers.map(({ digest }) => blobName(digest)),
});

test("what was pulled by its signature is accepted offline, by that key and no other", async (t) => {
  for (const contents of [[bundle()], [signatureTag()]] as const) {
    const tar = writeFiles(t, await carried(t, {}, image, [...contents]));
    const report = await verify(tar, stranger, signer);
    assert.equal(report.images.length, 1, "none of the proof counts as an image");
    assert.equal((await failure(verify(tar, stranger))).code, "SIGNATURE");
  }
});

test("a platform is accepted by the signature of its index, or by its own", async (t) => {
  const index = makeMultiPlatform(["linux/amd64", "linux/arm64"]);
  for (const subject of [index, index.children[0] as TestContent]) {
    const proof = makeBundle(subject, makeBundleBytes(subject, signer));
    const files = await carried(t, {}, index, [proof]);
    assert.equal((await verify(writeFiles(t, files), signer)).images.length, 1);
  }
});

test("an index is accepted as a whole, with all its images or some of them", async (t) => {
  const index = makeMultiPlatform(["linux/amd64", "linux/arm64", "linux/s390x"]);
  const proof = makeBundle(index, makeBundleBytes(index, signer));
  const several = ["amd64", "arm64"].map((architecture) => ({ os: "linux", architecture }));
  for (const options of [{ isAll: true }, { several }]) {
    const files = await carried(t, options, index, [proof]);
    await verify(writeFiles(t, files), signer);
  }
});

test("a folder, and a stream, are accepted like a tar", async (t) => {
  const files = await carried(t);
  const folder = temporaryFolder(t);
  mkdirSync(join(folder, "blobs/sha256"), { recursive: true });
  for (const [name, bytes] of files) writeFileSync(join(folder, name), bytes);
  await verify(folder, signer);
  const stream = Readable.from([writeTar(files)]);
  await internals.verifyTar(stream, { signedBy: [signer.pem] });
  const again = Readable.from([writeTar(files)]);
  const refused = internals.verifyTar(again, { signedBy: [stranger.pem] });
  assert.equal((await failure(refused)).code, "SIGNATURE");
});

test("many large SBOMs, which are JSON too, do not keep the signature from being found", async (t) => {
  // Largest first, down to some bytes: they fill whatever room there is.
  const sizes = [
    ...Array.from({ length: 8 }, () => 2 ** 23),
    ...Array.from({ length: 16 }, (_, at) => 2 ** (22 - at)),
  ];
  const heavy = sizes.map((size, at) =>
    makeArtifact({
      artifactType: "application/spdx+json",
      subject: image,
      layers: [
        {
          mediaType: "application/spdx+json",
          bytes: Buffer.from(`{"${at}":"${" ".repeat(size - 20)}"}`),
        },
      ],
    }),
  );
  const files = await carried(t, {}, image, [...heavy, bundle(), signatureTag()]);
  const inOrder = [...files].sort(([, left], [, right]) => right.length - left.length);
  const report = await verify(writeFiles(t, new Map(inOrder)), signer);
  assert.equal(report.images.length, 1);
  await verify(writeFiles(t, files), signer);
});

test("a tar whose signatures were stripped is refused", async (t) => {
  const files = await carried(t);
  changeJson<IndexJson>(files, "index.json", (index) => ({
    ...index,
    manifests: index.manifests.slice(0, 1),
  }));
  await assertUnsigned(writeFiles(t, files), /no signature at all/);
});

for (const [name, swapped, words] of [
  ["of another image", makeBundle(other, makeBundleBytes(other, signer)), /something else/],
  ["by another key", makeBundle(image, makeBundleBytes(image, stranger)), /another key/],
  ["that is noise", makeBundle(image, deep(100_000)), /no form that is known/],
] as const) {
  test(`a signature ${name}, in the place of the right one, is refused`, async (t) => {
    const files = await carried(t, {}, image, [bundle()]);
    addContent(files, swapped);
    changeJson<IndexJson>(files, "index.json", (index) => ({
      ...index,
      manifests: [index.manifests[0], entryOf(swapped, { [SUBJECT]: image.digest })],
    }));
    await assertUnsigned(writeFiles(t, files), words);
  });
}

test("another image in the place of the signed one is refused", async (t) => {
  const files = await carried(t);
  addContent(files, other);
  changeJson<IndexJson>(files, "index.json", ({ manifests: [first, ...rest], ...index }) => ({
    ...index,
    manifests: [{ ...first, ...entryOf(other, first?.annotations) }, ...rest],
  }));
  changeJson(files, "manifest.json", () => [dockerEntryOf(other, "example.com/app:1")]);
  await assertUnsigned(writeFiles(t, files), new RegExp(other.digest));
});

test("another image in manifest.json alone is refused: docker loads by that", async (t) => {
  const files = await carried(t);
  addContent(files, other);
  changeJson(files, "manifest.json", () => [dockerEntryOf(other, "example.com/app:1")]);
  await assertUnsigned(writeFiles(t, files), /example\.com\/app:1 of manifest\.json/);
});

test("an image that is marked as proof, and has a name all the same, is refused", async (t) => {
  for (const mark of [{ [SUBJECT]: image.digest }, { kind: "dev.cosignproject.cosign/sigs" }]) {
    const files = await carried(t);
    addContent(files, other);
    changeJson<IndexJson>(files, "index.json", (index) => ({
      ...index,
      manifests: [...index.manifests, entryOf(other, { ...nameOf("example.com/evil:1"), ...mark })],
    }));
    await assertUnsigned(writeFiles(t, files), /example\.com\/evil/);
  }
});

for (const [name, annotations] of [
  [
    "an empty name before the other",
    {
      "io.containerd.image.name": "",
      "org.opencontainers.image.ref.name": "evil:1",
      [SUBJECT]: image.digest,
    },
  ],
  ["a name that is no text", { "io.containerd.image.name": ["evil:1"], [SUBJECT]: image.digest }],
  ["no name, but cosign's mark of a signature", { kind: "dev.cosignproject.cosign/sigs" }],
  ["no name, and no mark", {}],
] as const) {
  test(`an unsigned image with ${name} is refused: some loader takes it`, async (t) => {
    const files = await carried(t);
    addContent(files, other);
    changeJson<IndexJson>(files, "index.json", (index) => ({
      ...index,
      manifests: [...index.manifests, entryOf(other, annotations)],
    }));
    await assertUnsigned(writeFiles(t, files), new RegExp(other.digest));
  });
}

for (const [name, change] of [
  [
    "a digest in another case",
    (text: string) => text.replace('"size"', `"Digest":"${other.digest}","size"`),
  ],
  [
    "a digest given twice",
    (text: string) => text.replace('"digest"', `"digest":"${other.digest}","digest"`),
  ],
  [
    "a digest with an escape in its key",
    (text: string) => text.replace('"size"', `"d\\u0069gest":"${other.digest}","size"`),
  ],
  [
    "other annotations beside the right ones",
    (text: string) =>
      text.replace(
        '"annotations"',
        '"Annotations":{"io.containerd.image.name":"evil:1"},"annotations"',
      ),
  ],
  [
    "a second list",
    (text: string) => text.replace('"schemaVersion"', '"Manifests":[],"schemaVersion"'),
  ],
  [
    "a Kelvin sign",
    (text: string) => text.replace('"annotations":{', '"annotations":{"k":"1","\u212a":"2",'),
  ],
] as const) {
  test(`an index.json with ${name} is refused: others may read it otherwise`, async (t) => {
    const files = await carried(t);
    addContent(files, other);
    const before = String(files.get("index.json"));
    files.set("index.json", Buffer.from(change(before)));
    assert.notEqual(change(before), before);
    const error = await failure(verify(writeFiles(t, files), signer));
    assert.equal(error.code, "BAD_TAR");
    assert.match(error.message, /index\.json has two keys in one object/);
  });
}

test("a manifest.json with its config in two cases is refused", async (t) => {
  const files = await carried(t);
  addContent(files, other);
  const config = `"config":"${blobName(other.config.digest)}","Config"`;
  files.set(
    "manifest.json",
    Buffer.from(String(files.get("manifest.json")).replace('"Config"', config)),
  );
  const error = await failure(verify(writeFiles(t, files), signer));
  assert.match(error.message, /manifest\.json has two keys in one object/);
});

test("equal keys of different objects, and texts that look like keys, are right", async (t) => {
  const files = await carried(t);
  changeJson<IndexJson>(files, "index.json", ({ manifests: [first, ...rest], ...index }) => ({
    ...index,
    manifests: [
      {
        ...first,
        annotations: { ...first?.annotations, a: '"digest":"x","digest"', "b\\": "\\", c: "c" },
      },
      ...rest,
    ],
  }));
  await verify(writeFiles(t, files), signer);
});

test("an unsigned image for an unknown platform is refused", async (t) => {
  const files = await carried(t);
  addContent(files, other);
  const platform = { os: "unknown", architecture: "unknown" };
  changeJson<IndexJson>(files, "index.json", (index) => ({
    ...index,
    manifests: [...index.manifests, { ...entryOf(other), platform }],
  }));
  await assertUnsigned(writeFiles(t, files), new RegExp(other.digest));
});

test("an index that nobody signed, around a signed image, is refused", async (t) => {
  const files = await carried(t);
  const around = makeIndex([image, makeImage({ seed: "evil", platform: "linux/arm64" })]);
  addContent(files, around);
  changeJson<IndexJson>(files, "index.json", ({ manifests: [first, ...rest], ...index }) => ({
    ...index,
    manifests: [{ ...first, ...entryOf(around, first?.annotations) }, ...rest],
  }));
  await assertUnsigned(writeFiles(t, files), new RegExp(around.digest));
});

for (const [name, mark] of [
  ["a subject", { [SUBJECT]: image.digest }],
  [
    "a subject and cosign's kind",
    { [SUBJECT]: image.digest, kind: "dev.cosignproject.cosign/sigs" },
  ],
] as const) {
  test(`an index alone that is marked as proof by ${name} is refused: podman and skopeo load it`, async (t) => {
    const files = await carried(t);
    const { manifests } = JSON.parse(String(files.get("index.json"))) as IndexJson;
    const evil = makeImage({ seed: "evil" });
    addContent(files, evil);
    const proof = manifests.filter(({ digest }) => digest !== image.digest);
    const around = Buffer.from(
      JSON.stringify({
        schemaVersion: 2,
        mediaType: MEDIA.ociIndex,
        manifests: [entryOf(evil), entryOf(image), ...proof].map(
          ({ annotations, ...rest }) => rest,
        ),
      }),
    );
    const alone = { mediaType: MEDIA.ociIndex, digest: digestOf(around), size: around.length };
    files.set(blobName(alone.digest), around);
    changeJson<IndexJson>(files, "index.json", (index) => ({
      ...index,
      manifests: [{ ...alone, annotations: mark }],
    }));
    const tar = writeFiles(t, files);
    await assertUnsigned(tar, new RegExp(alone.digest));
    const { images } = await internals.verifyTar(tar);
    assert(images.some(({ digest }) => digest === evil.digest));
  });
}

test("of two images in a tar, one unsigned is enough to refuse", async (t) => {
  const files = await carried(t);
  addContent(files, other);
  changeJson<IndexJson>(files, "index.json", (index) => ({
    ...index,
    manifests: [...index.manifests, entryOf(other, nameOf("example.com/second:1"))],
  }));
  await assertUnsigned(writeFiles(t, files), /example\.com\/second:1@/);
});

test("a tar of nothing but proof holds no image", async (t) => {
  const files = await carried(t);
  changeJson<IndexJson>(files, "index.json", (index) => ({
    ...index,
    manifests: index.manifests.slice(1),
  }));
  files.set("manifest.json", Buffer.from("[]"));
  const error = await failure(verify(writeFiles(t, files), signer));
  assert.equal(error.code, "BAD_TAR");
});

test("an archive without an index has no digests that could be signed", async (t) => {
  const files = await carried(t);
  files.delete("index.json");
  files.delete("oci-layout");
  await assertUnsigned(writeFiles(t, files), /no signature at all/);
});

test("a link in the place of a signed image's config is not that config", async (t) => {
  const evil = makeImage({ seed: "forged", layers: image.layers }); // as long as the right one
  const files = await carried(t);
  addContent(files, evil);
  files.delete(blobName(image.config.digest));
  const tar = writeTar(files);
  const link = writeLink(blobName(image.config.digest), evil.config.digest.slice(7));
  const path = join(temporaryFolder(t), "linked.tar");
  writeFileSync(path, Buffer.concat([link, tar]));
  const error = await failure(verify(path, signer));
  assert(["SIGNATURE", "BAD_TAR"].includes(error.code), error.message);
});

test("a link in the place of a signed index is not that index", async (t) => {
  const index = makeMultiPlatform(["linux/amd64", "linux/arm64"]);
  const proof = makeBundle(index, makeBundleBytes(index, signer));
  const files = await carried(t, {}, index, [proof]);
  const evil = makeImage({ seed: "evil", platform: "linux/amd64" });
  const evilIndex = makeIndex([evil]);
  addContent(files, evilIndex);
  files.delete(blobName(index.digest));
  changeJson<IndexJson>(files, "index.json", ({ manifests: [first, , ...rest], ...json }) => ({
    ...json,
    manifests: [
      { ...first, ...entryOf(evil, first?.annotations) },
      { ...entryOf(evilIndex), digest: index.digest, platform: { os: "unknown" } },
      ...rest,
    ],
  }));
  changeJson(files, "manifest.json", () => [dockerEntryOf(evil, "example.com/app:1")]);
  const path = join(temporaryFolder(t), "linked.tar");
  const link = writeLink(blobName(index.digest), evilIndex.digest.slice(7));
  writeFileSync(path, Buffer.concat([link, writeTar(files)]));
  const error = await failure(verify(path, signer));
  assert(["SIGNATURE", "BAD_TAR"].includes(error.code), error.message);
});

test("the command says that a tar is signed, and by whom it is not", async (t) => {
  const folder = temporaryFolder(t);
  const tar = writeFiles(t, await carried(t));
  const [good, bad] = [join(folder, "good.pub"), join(folder, "bad.pub")];
  writeFileSync(good, signer.pem);
  writeFileSync(bad, stranger.pem);
  const right = await runCommand(["--verify", tar, "--signed-by", bad, "--signed-by", good]);
  assert.equal(right.exitCode, 0, right.stderr);
  assert.match(String(right.stdout), /1 image, .*: all is right, and signed by a key given\n/);
  const wrong = await runCommand(["--verify", tar, "--signed-by", bad]);
  assert.equal(wrong.exitCode, 1);
  assert.match(
    wrong.stderr,
    /not signed by any key given \(--signed-by\)\n {2}found: 2 signatures/,
  );
  const listed = await runCommand(["--list-tar", tar, "--signed-by", good]);
  assert.equal(listed.exitCode, 2, "it would have been no check");
});

// ====== Like everything else ======

/** A registry with two images, each signed, and a key file for the command. */
async function serveTwo(t: TestContext) {
  const [proof, second] = [bundle(), makeBundle(other, makeBundleBytes(other, signer))];
  const { registry, reference } = await serveWith(t, [proof, second, makeSbom(other)]);
  const folder = temporaryFolder(t);
  const key = join(folder, "cosign.pub");
  writeFileSync(key, signer.pem);
  const references = [reference, registry.add(other, REPOSITORY, "2.0")];
  const flags = ["--scheme", "http", "--signed-by", key];
  const pulled = join(folder, "bundle.tar");
  return { registry, references, folder, flags, pulled, proofs: [proof, second, makeSbom(other)] };
}

test("several images in one tar, on stdout too, and again by their lock lines", async (t) => {
  const { references, folder, flags, pulled, proofs } = await serveTwo(t);
  const first = await runCommand([...references, pulled, ...flags]);
  assert.equal(first.exitCode, 0, first.stderr);
  const tar = readFileSync(pulled);
  const files = filesOf(tar);
  assertHolds(files, image, other, ...proofs);
  const nameless = namelessIn(files).map(({ digest }) => digest);
  assert.deepEqual(nameless, proofs.map(({ digest }) => digest).sort());

  const streamed = await runCommand([...references, "-", ...flags]);
  assert.equal(streamed.exitCode, 0, streamed.stderr);
  assert(streamed.stdout.equals(tar));

  const lock = join(folder, "images.lock");
  writeFileSync(lock, first.stdout);
  const again = join(folder, "again.tar");
  const { exitCode, stderr } = await runCommand(["--from", lock, again, ...flags]);
  assert.equal(exitCode, 0, stderr);
  assert(readFileSync(again).equals(tar));
});

test("one image that is not signed stops the whole bundle, and is named", async (t) => {
  const { registry, references, flags, pulled } = await serveTwo(t);
  const unsigned = registry.add(makeImage({ seed: "third" }), REPOSITORY, "3.0");
  const { exitCode, stderr } = await runCommand([...references, unsigned, pulled, ...flags]);
  assert.equal(exitCode, 1);
  assert.match(stderr, /team\/app:3\.0@sha256:\w+ is not signed/);
  assert.doesNotMatch(stderr, /team\/app:[12]\.0@/);
  assert(!existsSync(pulled) && !existsSync(`${pulled}.partial`));
});

test("a pull that broke off goes on with its proof, to the same bytes", async (t) => {
  const heavy = makeArtifact({
    artifactType: "application/spdx+json",
    subject: image,
    layers: [{ mediaType: "application/spdx+json", bytes: Buffer.alloc(3_000_000, "sbom") }],
  });
  const served = await serveWith(t, [heavy, bundle()]);
  const folder = temporaryFolder(t);
  const [whole, broken] = [join(folder, "whole.tar"), join(folder, "broken.tar")];
  await pull(served.reference, whole, SIGNED_BY);

  const [layer = ""] = [...heavy.blobs.keys()].filter((digest) => !heavy.configs.has(digest));
  const rule = served.registry.on({ digest: layer }, { dropAfter: 1_000_000 });
  const options = { ...SIGNED_BY, retries: 0, concurrency: 1 };
  await failure(pull(served.reference, broken, options));
  assert(rule.hits > 0);
  rule.remove();
  const { fetchedBytes } = await pull(served.reference, broken, options);
  assert(fetchedBytes < 2_500_000, `${fetchedBytes} bytes were fetched again`);
  assert(readFileSync(broken).equals(readFileSync(whole)));
});

test("proof that a tar at hand has is not fetched", async (t) => {
  const served = await serveWith(t, [makeSbom(image)]);
  const folder = temporaryFolder(t);
  const [old, next] = [join(folder, "old.tar"), join(folder, "next.tar")];
  await pull(served.reference, old, { referrers: true });
  const { fetchedBytes } = await pull(served.reference, next, { referrers: true, reuse: [old] });
  assert.equal(fetchedBytes, 0);
  assert(readFileSync(next).equals(readFileSync(old)));
});

test("a dry run checks signatures and writes nothing", async (t) => {
  const { registry, references, flags, pulled, folder } = await serveTwo(t);
  const right = await runCommand([...references, pulled, "--dry-run", ...flags]);
  assert.equal(right.exitCode, 0, right.stderr);
  const unsigned = registry.add(makeImage({ seed: "third" }), REPOSITORY, "3.0");
  const wrong = await runCommand([unsigned, pulled, "--dry-run", ...flags]);
  assert.equal(wrong.exitCode, 1);
  assert.match(wrong.stderr, /is not signed/);
  assert.deepEqual(readdirSync(folder), ["cosign.pub"]);
});

test("a delta has its proof whole: --since leaves out layers of images only", async (t) => {
  const served = await serveWith(t, [makeSbom(image), bundle()]);
  const folder = temporaryFolder(t);
  const [base, delta] = [join(folder, "base.tar"), join(folder, "delta.tar")];
  await pull(served.reference, base, { referrers: true });
  await pull(served.reference, delta, { referrers: true, since: base });
  const files = filesOf(readFileSync(delta));
  assertHolds(files, makeSbom(image));
  for (const { digest } of image.layers) assert(!files.has(blobName(digest)));
});
