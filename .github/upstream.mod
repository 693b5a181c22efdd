// Dependencies of cmd/upstream in jobs that may write. An update changes go.mod by
// itself, so a new release of a module would run there with all rights. These versions
// and their hashes change only by a person:
//
//	go get -modfile .github/upstream.mod MODULE@VERSION
module derpd

go 1.27.4

require (
	github.com/google/go-containerregistry v0.22.1
	golang.org/x/mod v0.41.0
)

require (
	github.com/docker/cli v29.7.2+incompatible // indirect
	github.com/docker/docker-credential-helpers v0.9.5 // indirect
	github.com/klauspost/compress v1.20.0 // indirect
	github.com/opencontainers/go-digest v1.0.0 // indirect
	github.com/opencontainers/image-spec v1.1.1 // indirect
	github.com/sirupsen/logrus v1.10.2 // indirect
	golang.org/x/sync v0.24.0 // indirect
	golang.org/x/sys v0.49.0 // indirect
	gotest.tools/v3 v3.5.2 // indirect
)
