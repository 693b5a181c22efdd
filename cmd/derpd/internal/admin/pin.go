package admin

import (
	"io"
	"net/http"
)

// servePinAccept answers `derpd pin --accept` with the new map.
func (c Config) servePinAccept(w http.ResponseWriter, r *http.Request) {
	format := r.FormValue("format")
	// The map is made before too: an order with an unknown format changes nothing.
	_, err := c.Map(r.Context(), format)
	if err == nil {
		err = c.AcceptPin(r.FormValue("hash"))
	}
	if err != nil {
		w.Header().Set("Content-Type", refusalType)
		w.WriteHeader(http.StatusConflict)
		_, _ = io.WriteString(w, err.Error()+"\n")
		return
	}
	c.serveMap(w, r)
}
