// Signatures as cosign makes them, made here without cosign and without the module under test.
import { generateKeyPairSync, type KeyObject, sign } from "node:crypto";
import { internals } from "../../imgpull.ts";
import { MEDIA, makeArtifact, makeManifest, type TestContent } from "./image.ts";
import type { Registry } from "./registry.ts";

export const SIMPLE_SIGNING = "application/vnd.dev.cosign.simplesigning.v1+json";
export const BUNDLE = "application/vnd.dev.sigstore.bundle.v0.3+json";
export const IN_TOTO = "application/vnd.in-toto+json";
export const SUBJECT = "io.containerd.manifest.subject";

export interface TestSigner {
  privateKey: KeyObject;
  pem: string;
  hash: string | null;
}

export function makeSigner(kind: "P-256" | "P-384" | "P-521" | "rsa" | "ed25519"): TestSigner {
  const [pair, hash] = {
    "P-256": () => [generateKeyPairSync("ec", { namedCurve: "P-256" }), "sha256"] as const,
    "P-384": () => [generateKeyPairSync("ec", { namedCurve: "P-384" }), "sha384"] as const,
    "P-521": () => [generateKeyPairSync("ec", { namedCurve: "P-521" }), "sha512"] as const,
    rsa: () => [generateKeyPairSync("rsa", { modulusLength: 2048 }), "sha256"] as const,
    ed25519: () => [generateKeyPairSync("ed25519"), null] as const,
  }[kind]();
  const pem = pair.publicKey.export({ type: "spki", format: "pem" }).toString();
  return { privateKey: pair.privateKey, pem, hash };
}

export const keyOf = ({ pem }: TestSigner): ReturnType<typeof internals.parsePublicKey> =>
  internals.parsePublicKey(pem, "test.pub");

const signed = ({ privateKey, hash }: TestSigner, message: Buffer): string =>
  sign(hash, message, privateKey).toString("base64");

// ====== cosign's first form ======

export interface PayloadOptions {
  /** What the payload names; default the image. */
  digest?: string;
  type?: string;
  /** Takes the place of the payload that was signed. */
  changeTo?: (payload: Buffer) => Buffer;
  /** Laid over the layer's annotations: a certificate. */
  annotations?: Record<string, string>;
}

export interface SignatureLayer {
  mediaType: string;
  bytes: Buffer;
  annotations: Record<string, string>;
}

export function makePayloadLayer(
  image: TestContent,
  signer: TestSigner,
  options: PayloadOptions = {},
): SignatureLayer {
  const { digest = image.digest, type = "cosign container image signature" } = options;
  const critical = {
    identity: { "docker-reference": "example.com/team/app" },
    image: { "docker-manifest-digest": digest },
    type,
  };
  const payload = Buffer.from(JSON.stringify({ critical, optional: null }));
  return {
    mediaType: SIMPLE_SIGNING,
    bytes: options.changeTo?.(payload) ?? payload,
    annotations: {
      "dev.cosignproject.cosign/signature": signed(signer, payload),
      ...options.annotations,
    },
  };
}

/** What cosign pushes as `sha256-HEX.sig`. */
export const makeSignatureTag = (...layers: SignatureLayer[]): TestContent =>
  makeArtifact({ configMediaType: MEDIA.ociConfig, layers });

export const sigTag = (subject: TestContent, suffix = ".sig"): string =>
  `${subject.digest.replace(":", "-")}${suffix}`;

// ====== cosign's second form ======

export interface BundleOptions {
  /** What the statement names; default the image. */
  digest?: string;
  statementType?: string;
  payloadType?: string;
  /** What was signed as the type, where it is another than what is said. */
  signedType?: string;
  mediaType?: string;
  changeTo?: (payload: Buffer) => Buffer;
  verificationMaterial?: unknown;
  extraSignatures?: string[];
}

/** DSSE's pre-authentication encoding. */
const encodeForSigning = (type: string, payload: Buffer): Buffer =>
  Buffer.concat([
    Buffer.from(`DSSEv1 ${Buffer.byteLength(type)} ${type} ${payload.length} `),
    payload,
  ]);

export function makeBundleBytes(
  image: TestContent,
  signer: TestSigner,
  options: BundleOptions = {},
): Buffer {
  const { digest = image.digest, payloadType = IN_TOTO, extraSignatures = [] } = options;
  const [algorithm = "", hex] = digest.split(":");
  const statement = Buffer.from(
    JSON.stringify({
      _type: options.statementType ?? "https://in-toto.io/Statement/v1",
      subject: [{ digest: { [algorithm]: hex }, annotations: {} }],
      predicateType: "https://sigstore.dev/cosign/sign/v1",
      predicate: {},
    }),
  );
  const message = encodeForSigning(options.signedType ?? payloadType, statement);
  const signatures = [signed(signer, message), ...extraSignatures].map((sig) => ({ sig }));
  const payload = (options.changeTo?.(statement) ?? statement).toString("base64");
  return Buffer.from(
    JSON.stringify({
      mediaType: options.mediaType ?? BUNDLE,
      verificationMaterial: options.verificationMaterial ?? { publicKey: { hint: "hint" } },
      dsseEnvelope: { payload, payloadType, signatures },
    }),
  );
}

/** A referrer with this bundle, or with these bytes in its place. */
export const makeBundle = (subject: TestContent, bytes: Buffer): TestContent =>
  makeArtifact({ artifactType: BUNDLE, subject, layers: [{ mediaType: BUNDLE, bytes }] });

/** An SBOM of something, as `oras attach` makes it. */
export const makeSbom = (subject: TestContent, seed = "sbom"): TestContent =>
  makeArtifact({
    artifactType: "application/spdx+json",
    subject,
    layers: [{ mediaType: "application/spdx+json", bytes: Buffer.from(`{"name":"${seed}"}`) }],
  });

/** The index under the tag that stands for the referrers endpoint. */
export function addFallbackTag(
  registry: Registry,
  repository: string,
  subject: TestContent,
  referrers: TestContent[],
): void {
  const manifests = referrers.map(({ mediaType, digest, bytes }) => ({
    mediaType,
    digest,
    size: bytes.length,
  }));
  const index = { schemaVersion: 2, mediaType: MEDIA.ociIndex, manifests };
  for (const referrer of referrers) registry.add(referrer, repository);
  registry.add(makeManifest(MEDIA.ociIndex, index), repository, sigTag(subject, ""));
}
