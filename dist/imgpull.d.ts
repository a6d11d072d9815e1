/** An operating system and processor in Go's words: `{ os: "linux", architecture: "arm", variant: "v7" }`. */
interface Platform {
    os: string;
    architecture: string;
    variant?: string;
}
/** A content descriptor, OCI image specification, descriptor.md. `size` is in bytes. */
interface Descriptor {
    mediaType: string;
    digest: string;
    size: number;
    urls?: string[];
    platform?: Platform;
    annotations?: Record<string, string>;
}
/** What to pull and how. Only `url` is required; the rest has the command's defaults (SPEC §1, §9). */
interface PullerOpts {
    /** The image reference: `[HOST[:PORT]/]REPOSITORY[:TAG][@DIGEST]`. */ url: string;
    scheme?: "https" | "http";
    /** Platform wanted, in Go's words; the default is this machine's. */
    osType?: string;
    archType?: string;
    variant?: string;
    username?: string;
    password?: string;
    /** An outside token (ECR's), sent as `Authorization: Basic TOKEN`. */ token?: string;
    /** Paths of PEM files: client certificate and key, and additional certificate authorities. */
    tlsCert?: string;
    tlsKey?: string;
    caCert?: string;
    /** Does not verify the server's certificate. */ insecure?: boolean;
    /** The upstream registry that a mirror stands for: `?ns=HOST`. */ namespace?: string;
    /** Connections used at once; default 8, at most 64. */ concurrency?: number;
    /** Attempts after the first; default 5. */ retries?: number;
    /** How long a connection may be silent, in milliseconds; default 30000. */ timeoutMs?: number;
    signal?: AbortSignal;
    onProgress?: (progress: Progress) => void;
    /** One line each: a retry, a fallback, a layer that some loaders refuse. */ onWarning?: (message: string) => void;
}
/** Of one blob, in bytes. */
interface BlobProgress {
    digest: string;
    sizeBytes: number;
    doneBytes: number;
}
/** Bytes are of blobs, before any tar header; `doneBytes` never falls, and equals `totalBytes` at the end. */
interface Progress {
    phase: "resolve" | "fetch" | "finish";
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
/** What DEST now holds. `digest` is the manifest's (the index's when every platform was asked for); `platform` is
 *  `os/architecture[/variant]`, `all`, or empty for what is not an image; `sizeBytes` is DEST's (in a directory: of the
 *  blobs), `fetchedBytes` what came over the line as blobs: the rest was there already. */
interface PullResult {
    name: string;
    digest: string;
    platform: string;
    layers: number;
    sizeBytes: number;
    fetchedBytes: number;
}
/** A manifest as the registry sent it. `bytes` has the digest; `manifest` is the parsed JSON. */
interface ManifestHolder {
    mediaType: string;
    digest: string;
    bytes: Uint8Array;
    manifest: unknown;
    imageUrl: string;
}
type ErrorCode = "BAD_REFERENCE" | "BAD_OPTION" | "NOT_FOUND" | "UNAUTHORIZED" | "FORBIDDEN" | "RATE_LIMITED" | "NO_PLATFORM" | "NOT_AN_IMAGE" | "UNSUPPORTED" | "TOO_LARGE" | "DIGEST_MISMATCH" | "SIZE_MISMATCH" | "PROTOCOL" | "NETWORK" | "TIMEOUT" | "TLS" | "CREDENTIALS" | "PROXY" | "DISK" | "BAD_TAR" | "ABORTED";
/** The only error thrown on purpose; anything else is a bug. `status` is the HTTP status, where there was one. */
declare class ImgpullError extends Error {
    readonly name = "ImgpullError";
    readonly code: ErrorCode;
    readonly status?: number;
    constructor(code: ErrorCode, message: string, more?: {
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
