/** An operating system and processor in Go's words: `{ os: "linux", architecture: "arm", variant: "v7" }`. */
interface Platform {
    os: string;
    architecture: string;
    variant?: string;
}
/** A content descriptor (OCI image specification, descriptor.md). */
interface Descriptor {
    mediaType: string;
    /** `sha256:` and 64, or `sha512:` and 128 hex digits. */
    digest: string;
    /** In bytes. */
    size: number;
    /** Where the content can be had besides: foreign layers only. */
    urls?: string[];
    /** In an index: what the manifest is for. */
    platform?: Platform;
    annotations?: Record<string, string>;
}
/** What to pull and how. Only `url` is required; the rest has the command's defaults. */
interface PullerOpts {
    /** The image reference: `[HOST[:PORT]/]REPOSITORY[:TAG][@DIGEST]`. */
    url: string;
    /** How the registry is spoken to; default `https`. */
    scheme?: "https" | "http";
    /** Operating system wanted, in Go's words (`linux`); default: this machine's. */
    osType?: string;
    /** Processor wanted, in Go's words (`amd64`, `arm64`); default: this machine's. */
    archType?: string;
    /** Variant of the processor wanted (`v7`); default: the best that suits `archType`. */
    variant?: string;
    /** For basic credentials; default: docker's and podman's credential files are asked. */
    username?: string;
    /** The password of `username`. */
    password?: string;
    /** An outside token (ECR's), sent as `Authorization: Basic TOKEN`. */
    token?: string;
    /** Path of a PEM file: the client's certificate. Needs `tlsKey`. */
    tlsCert?: string;
    /** Path of a PEM file: the key of `tlsCert`. */
    tlsKey?: string;
    /** Path of a PEM file: certificate authorities that are trusted besides the system's. */
    caCert?: string;
    /** Does not verify the server's certificate; default false. */
    insecure?: boolean;
    /** The upstream registry that a mirror stands for: `?ns=HOST` on every request. */
    namespace?: string;
    /** Connections used at once, 1 to 64; default 8. */
    concurrency?: number;
    /** Attempts after the first; default 5. */
    retries?: number;
    /** How long a connection may be silent, in milliseconds; default 30000. */
    timeoutMs?: number;
    /** Stops everything at once; what is thrown then has the code `ABORTED`. */
    signal?: AbortSignal;
    /** Called as bytes arrive. */
    onProgress?: (progress: Progress) => void;
    /** Called with one line each: a retry, a fallback, a layer that some loaders refuse. */
    onWarning?: (message: string) => void;
}
/** How far one blob is. */
interface BlobProgress {
    digest: string;
    sizeBytes: number;
    doneBytes: number;
}
/** How far a pull is. Bytes are of blobs, before any tar header. */
interface Progress {
    phase: "resolve" | "fetch" | "finish";
    /** Never falls, and equals `totalBytes` at the end. */
    doneBytes: number;
    totalBytes: number;
    /** What came over the line so far, bytes that were fetched again included: for a rate. */
    fetchedBytes: number;
    blobsDone: number;
    blobsTotal: number;
    /** The blobs on their way, in DEST's order. */
    moving: readonly BlobProgress[];
    /** The blob that has just become whole. */
    finished?: BlobProgress;
}
/** What DEST now holds. */
interface PullResult {
    /** The image's name in DEST: `docker.io/library/alpine:3.22`. */
    name: string;
    /** Of the manifest, or of the index where every platform was asked for. */
    digest: string;
    /** `os/architecture[/variant]`, `all`, or empty for what is not an image. */
    platform: string;
    /** How many layers. */
    layers: number;
    /** DEST's size; in a directory, that of the blobs. */
    sizeBytes: number;
    /** What came over the line as blobs: the rest was there already. */
    fetchedBytes: number;
}
/** A manifest as the registry sent it. */
interface ManifestHolder {
    mediaType: string;
    /** The digest of `bytes`. */
    digest: string;
    /** Exactly what the registry sent. */
    bytes: Uint8Array;
    /** The parsed JSON of `bytes`. */
    manifest: unknown;
    /** The reference that was asked for. */
    imageUrl: string;
}
/** What went wrong, for programs: the `code` of an `ImgpullError`. */
type ErrorCode = "BAD_REFERENCE" | "BAD_OPTION" | "NOT_FOUND" | "UNAUTHORIZED" | "FORBIDDEN" | "RATE_LIMITED" | "NO_PLATFORM" | "NOT_AN_IMAGE" | "UNSUPPORTED" | "TOO_LARGE" | "DIGEST_MISMATCH" | "SIZE_MISMATCH" | "SIGNATURE" | "PROTOCOL" | "NETWORK" | "TIMEOUT" | "TLS" | "CREDENTIALS" | "PROXY" | "DISK" | "BAD_TAR" | "ABORTED";
/** The only error thrown on purpose; anything else is a bug. */
declare class ImgpullError extends Error {
    readonly name = "ImgpullError";
    readonly code: ErrorCode;
    /** The HTTP status, where there was one. */
    readonly status?: number;
    constructor(code: ErrorCode, message: string, details?: {
        status?: number | undefined;
        cause?: unknown;
    });
}
/** https, this system's platform. */
declare function newPullerOpts(url: string): PullerOpts;
/** Pulls one image. Throws ImgpullError: BAD_REFERENCE and BAD_OPTION at once, the rest from its methods. */
declare class Puller {
    #private;
    constructor(urlOrOpts: string | PullerOpts);
    getUrl(): string;
    getOpts(): PullerOpts;
    /** Leaves a verified tar at `dest`, or adds to the OCI layout there where that is a directory or ends in "/". */
    pullTar(dest: string): Promise<PullResult>;
    /** The index ("list") or the platform's manifest ("image"). NOT_FOUND where the registry has no index for it. */
    pullManifest(type: "list" | "image"): Promise<ManifestHolder>;
    /** Whatever the registry has under the reference: an index or an image manifest. */
    getManifest(): Promise<ManifestHolder>;
    /** The manifest's descriptor by a HEAD request; by its bytes where the registry leaves something out. */
    headManifest(): Promise<{
        mediaType: string;
        digest: string;
        size: number;
    }>;
    /** Every blob of an image manifest as `dir/HEX`, verified; those that are there already are kept. */
    pullBlobs(holder: ManifestHolder, dir: string): Promise<void>;
}
export type { Descriptor, ErrorCode, ManifestHolder, Platform, Progress, PullerOpts, PullResult };
export { ImgpullError, newPullerOpts, Puller };
